"""What each span and number of directions buy, from bench/directions.py."""

from __future__ import annotations

import math
import statistics
from typing import Any

from page import read_json  # beside this file

WORKERS = """`python bench/directions.py`: along the demo's run (learning rate {rate}, means over updates {updates}),
against exact gradients of {chains:,} chains. A worker runs {pairs} pairs an update. Error: E |w z - g_C|^2 / |g_C|^2 of
the zeroth-order term z with its best weight w, g_C the part of the gradient at its steps; 1 is what leaving it out
costs.
In brackets: the same from pairs really run. Cosine: expected, with the whole gradient, of first order + w z, then with
half order too (80 chains each), when the optimizer averages {averaging} updates. Captured: |P g_C|^2 / |g_C|^2.
Machine: two x86-64 cores.

| span of the directions | captured | {heads} |
|---|---|{rules}
{rows}
"""

SPANS = ("isotropic", "the four guides", *(f"{count} components of half order" for count in (4, 8, 16, 32)))
PAIRS, AVERAGING = 80, 8


def workers(rate: str = "0.1") -> str:
    """What each span and number of directions buy, from bench/directions.py."""
    found = read_json("directions.json")
    if found is None:
        return ""
    measured = found[rate]["measured"]
    counts = (1, 4, 16, 64)
    return WORKERS.format(
        rate=rate,
        updates=", ".join(measured),
        chains=1280,
        pairs=PAIRS,
        averaging=AVERAGING,
        heads=" | ".join(f"{n} worker{'s' * (n > 1)}: error; cosine; with half order" for n in counts),
        rules="---|" * len(counts),
        rows="\n".join(_span_row(name, list(measured.values()), [PAIRS * n for n in counts]) for name in SPANS),
    )


def _span_row(name: str, updates: list[dict[str, Any]], counts: list[int]) -> str:
    captured = sum(row["spans"][name]["signal"] for row in updates) / sum(row["part"] for row in updates)
    cells = [name, f"{captured:.2f}"]
    for count in counts:
        error = statistics.mean(zeroth_error(row, row["spans"][name], count) for row in updates)
        run = [rolled_error(row, name, count) for row in updates if f"error_{count}" in row["rollouts"].get(name, {})]
        cosines = [statistics.mean(total_cosine(row, name, count, half) for row in updates) for half in (False, True)]
        shown = f"{error:.2f}" + (f" ({statistics.mean(run):.2f})" if run else "")
        cells.append("; ".join([shown, *(f"{cosine:.2f}" for cosine in cosines)]))
    return f"| {' | '.join(cells)} |"


def _variance(span: dict[str, float], count: int) -> float:
    """Of a mean of `count` directions, by the law in core/zeroth_order.py."""
    return (span["dimensions"] * span["second_moment"] - max(span["signal"], 0.0)) / count


def zeroth_error(row: dict[str, Any], span: dict[str, float], count: int) -> float:
    """E |w z - g_C|^2 / |g_C|^2 with the best w."""
    signal = max(span["signal"], 0.0)
    return 1 - signal**2 / (signal + _variance(span, count)) / row["part"]


def rolled_error(row: dict[str, Any], name: str, count: int) -> float:
    """The same with the squared distance from the projected g_C that rollouts had, at the law's w."""
    span = row["spans"][name]
    signal = max(span["signal"], 0.0)
    w = signal / (signal + _variance(span, count))
    return 1 + (w**2 * row["rollouts"][name][f"error_{count}"] + (w**2 - 2 * w) * signal) / row["part"]


def total_cosine(row: dict[str, Any], name: str, count: int, half: bool, averaging: int = AVERAGING) -> float:
    """Of first order + w z (+ w' half order), each with the weight of least squared error, with the whole gradient."""
    span = row["spans"][name]
    signal, variance = max(span["signal"], 0.0), _variance(span, count) / averaging
    w = signal / (signal + variance)
    along = row["first_with_all"] + w * span["with_all"]
    square = row["first"] + row["first_variance"] / 80 / averaging + w**2 * (signal + variance)
    square += 2 * w * span["with_first"]
    if half:
        signal, variance = max(row["half"], 0.0), row["half_variance"] / 80 / averaging
        v = signal / (signal + variance)
        along += v * row["half_with_all"]
        square += v**2 * (signal + variance) + 2 * v * row["half_with_first"] + 2 * v * w * span["with_half"]
    return along / math.sqrt(square * row["all"])
