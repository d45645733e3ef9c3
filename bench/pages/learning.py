"""Tables of what the defaults reach: on the digits, on problems never tuned for, over rates and numbers of chains."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.common import MACHINE, Row, mean_se, read_rows, table, text
from bench.problems.problem import problems
from bench.runs.learning import ROWS, STANDARD, load

COSTS = (4_000, 8_000, 12_000, 24_000, 72_000, 216_000)  # forwards
SHARE = 0.7  # of the median, or of the best, below which a run counts as bad
SLACK = 0.9  # of a cost, from which a run's end stands for it: updates are whole
_PICTURES = ("precision", "recall", "nn", "pairwise")


def at_defaults(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["rate"] is None and row["chains"] is None]


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of some keys, in the order in which these first come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def gain_at(row: Row, cost: int) -> float | None:
    """Held-out gain at a cost, by straight lines between the points from 0; None beyond the run's end."""
    points = [[0, 0.0], *row["points"]]
    for (before, low, *_), (after, high, *_) in itertools.pairwise(points):
        if cost <= after:
            return low + (high - low) * (cost - before) / (after - before)
    last, gain, *_ = points[-1]
    return gain if cost * SLACK <= last else None


def cell(rows: Sequence[Row], value: Callable[[Row], float | None], digits: int = 2) -> str:
    """Mean and standard error over the runs, if all have the value."""
    values = [number for row in rows if (number := value(row)) is not None]
    return mean_se(values, digits) if values and len(values) == len(rows) else ""


def learning() -> str:
    rows = at_defaults([row for row in read_rows(ROWS) if row["problem"] == "digits"])
    if not rows:
        return ""
    groups = grouped(sorted(rows, key=_variant_and_cost), "variant", "forwards")
    gains = [_gains(*item) for item in groups.items()]
    ends = [_ends(*item) for item in groups.items()]
    heads = ("variant", "run of", "seeds", *(f"{cost // 1000}k" for cost in COSTS), "gain 1.0 at")
    rest = ("variant", "run of", "judge", "KL", "but the last step", *_PICTURES, "rewards", "s")
    return text("learning").format(gains=table(heads, gains), ends=table(rest, ends), machine=MACHINE)


def _variant_and_cost(row: Row) -> tuple[int, int]:
    return list(load()["variants"]).index(row["variant"]), row["forwards"]


def _gains(key: tuple[str, int], rows: list[Row]) -> list[str]:
    variant, forwards = key
    reached = sorted(row["to_gain_1"] or float("inf") for row in rows)
    middle = statistics.median(reached)
    gains = [cell(rows, lambda row, cost=cost: gain_at(row, cost)) for cost in COSTS]  # type: ignore[misc]
    first = f"{middle / 1000:.1f}k" if middle < float("inf") else "not reached"
    return [variant, f"{forwards // 1000}k", str(len(rows)), *gains, first]


def _ends(key: tuple[str, int], rows: list[Row]) -> list[str]:
    variant, forwards = key
    cells = [cell(rows, lambda row: row["judge"]), cell(rows, lambda row: row.get("kl"), 0)]
    cells.append(cell(rows, but_the_last_step, 0))
    cells += [cell(rows, lambda row, name=name: row.get(name)) for name in _PICTURES]  # type: ignore[misc]
    calls = cell(rows, lambda row: row.get("reward_calls"), 0)
    return [variant, f"{forwards // 1000}k", *cells, calls, cell(rows, lambda row: row["seconds"], 0)]


def but_the_last_step(row: Row) -> float | None:
    steps = row.get("kl_by_step")
    return sum(nats or 0 for nats in steps[:-1]) if steps else None


def defaults() -> str:
    rows = [row for row in at_defaults(read_rows(ROWS)) if row["forwards"] == STANDARD]
    order = list(problems())
    groups = grouped(sorted(rows, key=lambda row: (order.index(row["problem"]), *_variant_and_cost(row))), *_PROBLEM)
    groups = {key: runs for key, runs in groups.items() if key[1] in load()["sets"]["defaults"]["variants"]}
    if not groups:
        return ""
    heads = ("problem", "reward", "seeds", "gain, median", "worst", "below its start", "below 70 %", "judge", "KL")
    lines = [_problem(*item) for item in groups.items()]
    return text("defaults").format(rows=table([*heads, "trusted", "steps back"], lines), machine=MACHINE)


_PROBLEM = ("problem", "variant")


def _problem(key: tuple[str, str], rows: list[Row]) -> list[str]:
    gains = [row["gain"] for row in rows]
    middle = statistics.median(gains)
    bad = sum(gain < 0 for gain in gains), sum(gain < SHARE * middle for gain in gains)
    before, after = (statistics.median(row[name] for row in rows) for name in ("judge_before", "judge"))
    known = [row["kl"] for row in rows if row.get("kl") is not None]
    trusted = [row["trusted"] for row in rows if row.get("trusted") is not None]
    return [
        *key,
        str(len(rows)),
        f"{middle:.3g}",
        f"{min(gains):.3g}",
        *(f"{count} of {len(rows)}" for count in bad),
        f"{before:.2f} to {after:.2f}",
        f"{statistics.median(known):.0f}" if known else "",
        f"{statistics.median(trusted):.0%}" if trusted else "",
        str(sum(row.get("steps_back") or 0 for row in rows)),
    ]


def sensitivity() -> str:
    tried = load()["sets"]["sensitivity"]
    settings = [
        (None, None),
        *((rate, None) for rate in tried["rates"]),
        *((None, chains) for chains in tried.get("chains", ())),
    ]
    rows = [row for row in read_rows(ROWS) if row["problem"] in tried["problems"] and row["forwards"] == STANDARD]
    rows = [row for row in rows if row["variant"] in tried["variants"] and row["seed"] < tried["seeds"]]
    lines = [
        _sensitivity(key, grouped(runs, "rate", "chains"), settings) for key, runs in grouped(rows, *_PROBLEM).items()
    ]
    heads = [_setting(*setting) for setting in settings]
    shown = [line for line in lines if sum(map(bool, line)) > len(_PROBLEM) + 2]  # more than the default
    words = table(("problem", "reward", *heads, "lowest of best"), shown)
    return text("sensitivity").format(rows=words, seeds=tried["seeds"], machine=MACHINE) if shown else ""


def _setting(rate: float | None, chains: int | None) -> str:
    return "default" if rate is None and chains is None else f"{chains} chains" if chains else f"rate {rate:g}"


def _sensitivity(key: tuple[str, str], runs: dict[tuple[Any, ...], list[Row]], settings: Sequence[Any]) -> list[str]:
    means = [statistics.mean(row["gain"] for row in runs[setting]) for setting in settings if setting in runs]
    cells = [cell(runs.get(setting, []), lambda row: row["gain"]) for setting in settings]
    return [*key, *cells, f"{min(means) / max(means):.0%}"]
