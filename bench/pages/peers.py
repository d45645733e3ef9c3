"""Peers at their best beside our defaults on the digits: the tables and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.common import IMAGES, MACHINE, Row, mean_se, read_rows, table, text
from bench.pages.learning import COSTS, at_defaults, but_the_last_step, cell, gain_at, grouped
from bench.peers.best import FILE, LADDER, TABLE, best
from bench.runs.learning import ROWS, cost_of
from bench.runs.sweep import CHOICE_SEED

HEADS: tuple[str, ...] = ("trainer", "reward", "rate", "chains", "seeds", *(f"{cost // 1000}k" for cost in COSTS))
HEADS += ("gain 1.0 at", "rewards", "judge", "KL", "but the last step", "precision", "recall", "nn", "pairwise")
OURS = {"gradient": "gradient", "black box": "black box", "rlr": "gradient"}  # variant of learning.yaml -> reward
STEP = 2_000  # between the points of a mean

Runs = dict[int, list[Row]]  # forwards of a run -> its rows, a seed each


def peers() -> str:
    rows = read_rows(FILE)
    if not rows:
        return ""
    known = lines(rows)
    figure(known, IMAGES / "peers.png")
    versions: Row = next((row["versions"] for row in rows if "versions" in row), {})
    return text("peers").format(
        trl=versions.get("trl", "0.12.2"),
        difference=max((row["difference"] for row in rows if "difference" in row), default=0.0),
        rows=table(HEADS, [_line(label, runs) for label, runs in known.items()]),
        sweep=_sweep([row for row in rows if row["seed"] == CHOICE_SEED]),
        machine=MACHINE,
    )


def lines(rows: Sequence[Row]) -> dict[str, Runs]:
    """Of the table's seeds: ours first, then the peers, those of the highest gain first."""
    ours = [row for row in at_defaults(read_rows(ROWS)) if row["problem"] == "digits" and row["variant"] in OURS]
    known = {f"ours: {variant}": _by_cost(runs) for (variant,), runs in grouped(ours, "variant").items()}
    digits = [row for row in rows if row["seed"] != CHOICE_SEED and row["problem"] == "digits"]
    theirs = {str(variant): _by_cost(runs) for (variant,), runs in grouped(digits, "variant").items()}
    theirs = {variant: runs for variant, runs in theirs.items() if TABLE in runs}
    return known | dict(sorted(theirs.items(), key=lambda item: -statistics.mean(map(_end, item[1][TABLE]))))


def _by_cost(rows: Sequence[Row]) -> Runs:
    return {int(forwards): runs for (forwards,), runs in sorted(grouped(rows, "forwards").items())}


def _end(row: Row) -> float:
    return float(row["points"][-1][1])


def runs_at(runs: Runs, cost: int) -> list[Row]:
    """The runs of the least forwards that come to a cost: our rates fall along a run, so a longer one is another."""
    return next((rows for forwards, rows in runs.items() if forwards >= cost), [])


def black_box(label: str) -> bool:
    return OURS.get(label.removeprefix("ours: "), "gradient" if "AlignProp" in label else "black box") == "black box"


def _line(label: str, runs: Runs) -> list[str]:
    first, told = next(iter(runs.values())), runs.get(TABLE) or next(iter(runs.values()))
    setting = ["", ""] if label.startswith("ours") else [f"{first[0]['learning_rate']:g}", str(first[0]["chains"])]
    cells = [label, "black box" if black_box(label) else "gradient", *setting, str(len(told))]
    cells += [cell(runs_at(runs, cost), lambda row, cost=cost: gain_at(row, cost)) for cost in COSTS]  # type: ignore[misc]
    cells += [_reached([cost_of(row["points"], 1.0) for row in first])]
    cells += [cell(told, lambda row: row.get("reward_calls"), 0), cell(told, lambda row: row["judge"])]
    cells += [cell(told, lambda row: row.get("kl"), 0), cell(told, _but_the_last, 0)]
    pictures = ("precision", "recall", "nn", "pairwise")
    return [*cells, *(cell(told, lambda row, name=name: row.get(name)) for name in pictures)]  # type: ignore[misc]


def _reached(costs: Sequence[float | None]) -> str:
    """Mean over the seeds that come to it, and how many those are if not all."""
    there = [cost / 1000 for cost in costs if cost is not None]
    if not there:
        return "never"
    return f"{mean_se(there, 1)}k" + (f" ({len(there)} of {len(costs)})" if len(there) < len(costs) else "")


def _but_the_last(row: Row) -> float | None:
    return row.get("kl_without_last", but_the_last_step(row))


def _sweep(rows: Sequence[Row]) -> str:
    """Gain at the sweep's cost by rate; the best of a trainer, which the table has, in bold."""
    rates = [rate for rate in LADDER if any(row["learning_rate"] == rate for row in rows)]
    cells = []
    for (variant, chains), runs in sorted(grouped(rows, "variant", "chains").items()):
        gains = {row["learning_rate"]: f"{_end(row):.2f}" for row in runs}
        chosen = best(variant, rows)
        if chosen["chains"] == chains:
            gains[chosen["learning_rate"]] = f"**{gains[chosen['learning_rate']]}**"
        cells.append([variant, str(chains), *(gains.get(rate, "") for rate in rates)])
    return table(["trainer", "chains", *(f"{rate:g}" for rate in rates)], cells)


def figure(known: dict[str, Runs], path: Path) -> None:
    """Mean gain over the seeds against cost, its range as a band; ours dashed."""
    figure = Figure((12, 4.6))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, (False, True), strict=True):
        axis.axhline(0, color="grey", lw=0.5)
        for label, runs in known.items():
            if black_box(label) == kind:
                _draw(axis, label, runs.get(TABLE) or next(iter(runs.values())))
        axis.set_title("black-box reward" if kind else "reward with its gradient", fontsize=10)
        if axis.get_lines()[1:]:
            axis.legend(fontsize=7, loc="lower right")
        axis.set_ylim(-1.5, 2.5)
    figure.supxlabel("denoiser forwards, thousands (a backward counts two)", fontsize=9)
    figure.supylabel("held-out gain", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw(axis: object, label: str, rows: Sequence[Row]) -> None:
    costs = range(0, int(min(row["points"][-1][0] for row in rows)) + 1, STEP)
    gains = [[gain_at(row, cost) or 0.0 for row in rows] for cost in costs]
    thousands = [cost / 1000 for cost in costs]
    style = "--" if label.startswith("ours") else "-"
    (drawn,) = axis.plot(thousands, list(map(statistics.mean, gains)), style, lw=1.6, label=label)  # type: ignore[attr-defined]
    band = list(map(min, gains)), list(map(max, gains))
    axis.fill_between(thousands, *band, color=drawn.get_color(), alpha=0.08, lw=0)  # type: ignore[attr-defined]
