"""Write docs/benchmarks.md from bench/results: `python bench/tables.py`. Figures cannot drift from data."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ablation import VARIANTS  # beside this file

BENCH = Path(__file__).resolve().parent
PAGE = BENCH.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python bench/tables.py` from the files in `bench/results`; do not edit.
"""

ABLATION = """## What each term of the demo contributes

`python bench/ablation.py`: `configs/digits.yaml` in one process (`cluster: none`, the same numbers as on Ray) under
other plans, each with the same cost in denoiser forwards (a backward counts two). Gain: held-out reward after minus
before, 400 paired chains; a single run's standard error is about {error:.2f}, and the spread over seeds is larger, so
rows that differ by less than that spread are ties. Judge: share of pictures that a classifier which is never trained
on reads as the digit asked for; {judge:.2f} before. Machine: two x86-64 cores, one thread a run.

{tables}"""

TABLE = """{title}

| plan | updates | gain at half the cost, by seed | gain, mean | gain by seed | judge after, mean | judge by seed |
|---|---|---|---|---|---|---|
{rows}
"""

TITLES = {
    "ablation.jsonl": "The demo's adapter (LoRA rank 1, learning rate .1), seeds {seeds}:",
    "ablation_rank4.jsonl": "LoRA rank 4, learning rate .05 (`python bench/ablation.py --rank4`), seeds {seeds}:",
}

STEP = """## Memory and seconds at Stable Diffusion 1.4's true size

`bash bench/gpu.sh` (random weights, T = {steps}, guidance 5, 512 x 512 pixels, {batch} chain at once, LoRA rank 4:
{trained_numbers:,} numbers; torch {torch}). Peak memory beyond the idle model. Machine: {machine}.

| part of an update | seconds | peak GiB |
|---|---|---|
{rows}
"""

WORKERS = """## What more rollout workers buy

`python bench/directions.py`: along the demo's run (learning rate {rate}, means over updates {updates}), against
exact gradients of {chains:,} chains. A worker runs {pairs} pairs an update. Error: E |w z - g_C|^2 / |g_C|^2 of the
zeroth-order term z with its best weight w, g_C the part of the gradient at its steps; 1 is what leaving it out costs.
In brackets: the same from pairs really run. Cosine: expected, with the whole gradient, of first order + w z, then with
half order too (80 chains each), when the optimizer averages {averaging} updates. Captured: |P g_C|^2 / |g_C|^2.
Machine: two x86-64 cores.

| span of the directions | captured | {heads} |
|---|---|{rules}
{rows}
"""

NO_STEP = """## Memory and seconds at Stable Diffusion 1.4's true size

Not measured yet: `bash bench/gpu.sh` on a machine with a GPU fills this in.
"""


def ablation() -> str:
    files = {name: BENCH / "results" / name for name in TITLES}
    runs = {name: _read(file) for name, file in files.items() if file.exists()}
    every = [row for rows in runs.values() for row in rows]
    return ABLATION.format(
        error=statistics.mean(row["gain_se"] for row in every),
        judge=statistics.mean(row["judge_before"] for row in every),
        tables="\n".join(_ablation_table(TITLES[name], rows) for name, rows in runs.items()),
    )


def _read(file: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["seed"])


def _ablation_table(title: str, rows: list[dict[str, Any]]) -> str:
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: list(VARIANTS).index(row["variant"])):
        by_variant.setdefault(row["variant"], []).append(row)
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    lines = "\n".join(_ablation_row(variant, runs) for variant, runs in by_variant.items())
    return TABLE.format(title=title.format(seeds=seeds), rows=lines)


def _ablation_row(variant: str, runs: list[dict[str, Any]]) -> str:
    gains, judges = [run["gain"] for run in runs], [run["judge_after"] for run in runs]
    half = [run["held_out_by_quarter"][1] - run["reward_before"] for run in runs]
    cells = [variant, str(runs[0]["steps"]), _list(half), f"{statistics.mean(gains):.2f}", _list(gains)]
    cells += [f"{statistics.mean(judges):.2f}", _list(judges)]
    return f"| {' | '.join(cells)} |"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def step() -> str:
    file = BENCH / "results" / "sd_step.json"
    if not file.exists():
        return NO_STEP
    facts = json.loads(file.read_text())
    rows = [f"| {name} | {row['seconds']:.3f} | {row['peak_gib']:.2f} |" for name, row in facts.pop("rows").items()]
    return STEP.format(rows="\n".join(rows), **facts)


SPANS = ("isotropic", "the four guides", *(f"{count} components of half order" for count in (4, 8, 16, 32)))
PAIRS, AVERAGING = 80, 8


def workers(rate: str = "0.1") -> str:
    """What each span and number of directions buy, from bench/directions.py."""
    file = BENCH / "results" / "directions.json"
    if not file.exists():
        return ""
    measured = json.loads(file.read_text())[rate]["measured"]
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


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([HEAD, ablation(), workers(), step()]))
    print(PAGE)


if __name__ == "__main__":
    main()
