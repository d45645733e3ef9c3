"""TRL's image trainers beside our plans: the table and the figure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.common import IMAGES, MACHINE, RESULTS, Row, mean_se, read_json, read_rows, table, text
from bench.runs.sweep import CHOICE_SEED

COST, GAIN, SEEDS = 72_000, 1.0, (0, 1, 2)  # of a run of TRL's; a gain to be reached; seeds of the table
STEP = 3_000  # between the points of a mean
# The ablation's name of a plan -> ours here.
OURS = {
    "full backprop": "ours: full_bp",
    "planner's choice, FO(4) + REINFORCE": "ours: planner's choice",
    "FO + HO + ZO (rlr)": "ours: rlr",
    "DDPO (REINFORCE)": "ours: ddpo",
    "surrogate alone": "ours: surrogate, rest: none",
    "ES": "ours: es",
}
BLACK_BOX = ("DDPO", "ddpo", "surrogate", "es")
HEADS: tuple[str, ...] = (
    "trainer",
    "learning rate",
    "seeds",
    "best gain",
    "at cost",
    f"gain at {COST:,}",
    "gain at the end",
    "judge",
)
HEADS += (f"cost of gain {GAIN:g}", "CPU s per 1,000", "peak MiB")

Point = tuple[float, float]  # cost, gain


@dataclass(frozen=True)
class Line:
    """One trainer's or plan's runs."""

    label: str
    rows: Sequence[Row]
    curves: Sequence[Sequence[Point]]
    long: Sequence[Point] = ()  # of one seed, three times as long

    @property
    def black_box(self) -> bool:
        return any(word in self.label for word in BLACK_BOX)

    @property
    def end(self) -> float:
        return min(curve[-1][0] for curve in self.curves)

    def mean(self, cost: float) -> float:
        return statistics.mean(gain_at(curve, cost) for curve in self.curves)

    def grid(self) -> list[float]:
        return [STEP * k for k in range(int(self.end // STEP) + 1)]

    def best(self) -> Point:
        """Where the mean gain is highest."""
        return max(((cost, self.mean(cost)) for cost in self.grid()), key=lambda point: point[1])

    def reached(self, gain: float) -> float | None:
        """The least cost at which the mean gain is at least this."""
        return next((cost for cost in self.grid() if self.mean(cost) >= gain), None)


def gain_at(curve: Sequence[Point], cost: float) -> float:
    """On the line between the points measured."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if before <= cost <= after:
            return low + (high - low) * (cost - before) / (after - before)
    return curve[-1][1]


def lines() -> dict[str, Line]:
    """TRL's first, then ours, by the names of peers_costs.json."""
    known, long = {}, {row["variant"]: _points(row) for row in read_rows(RESULTS / "peers_long.jsonl")}
    runs = [row for row in read_rows(RESULTS / "peers.jsonl") if row["seed"] in SEEDS]
    for name in dict.fromkeys(row["variant"] for row in runs):
        rows = [row for row in runs if row["variant"] == name]
        whose = "TRL" if "versions" in rows[0] else "ours"
        known[name] = Line(f"{whose}: {name}", rows, [_points(row) for row in rows], long.get(name, ()))
    ours = [*read_rows(RESULTS / "ablation.jsonl"), *read_rows(RESULTS / "surrogate.jsonl")]
    for name, label in OURS.items():
        runs = [row for row in ours if row["variant"] == name and "curve" in row]
        rows = [row for row in runs if row["seed"] in SEEDS]
        rows = rows or [max(runs, key=lambda row: row["gain"])]  # of the sweep, while there is nothing else
        known[name] = Line(label, rows, [_curve(row) for row in rows], long.get(name, ()))
    return known


def _points(row: Row) -> list[Point]:
    """Of a run of bench/peers/runs.py; the next: of the ablation."""
    return [(point["cost"], point["reward"] - row["curve"][0]["reward"]) for point in row["curve"]]


def _curve(row: Row) -> list[Point]:
    cost = (row["denoiser_forwards"] + 2 * row["denoiser_backwards"]) / row["steps"]
    return [(int(step) * cost, reward - row["reward_before"]) for step, reward in row["curve"].items()]


def peers() -> str:
    rows, costs, refused = (
        read_rows(RESULTS / "peers.jsonl"),
        read_json("peers_costs.json"),
        read_json("peers_refused.json"),
    )
    if costs is None or refused is None or not any(row["seed"] in SEEDS for row in rows):
        return ""
    known = lines()
    figure(list(known.values()), IMAGES / "peers.png")
    return text("peers").format(
        **next(row["versions"] for row in rows if "versions" in row),
        difference=max(row.get("difference", 0) for row in rows if "as shipped" not in row["variant"]),
        rates=", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in rows})),
        seeds=", ".join(map(str, SEEDS)),
        long=_long(list(known.values())),
        machine=MACHINE,
        rows=table(HEADS, [_row(line, costs["costs"].get(name, {})) for name, line in known.items()]),
        alike=_alike(costs["alike"]),
        refusals=table(
            ("settings", "error", "updates before it"),
            [[name, told["error"], str(told["updates"])] for name, told in refused.items()],
        ),
        sweep=_sweep([row for row in rows if row["seed"] == CHOICE_SEED]),
    )


def _row(line: Line, cost: dict[str, float]) -> list[str]:
    best, reached = line.best(), line.reached(GAIN)
    cells = [line.label, f"{line.rows[0]['learning_rate']:g}", ", ".join(str(row["seed"]) for row in line.rows)]
    cells += [f"{best[1]:.2f}", f"{best[0]:,.0f}", mean_se([gain_at(curve, COST) for curve in line.curves])]
    cells += [f"{line.mean(line.end):.2f} at {line.end:,.0f}", mean_se([row["judge_after"] for row in line.rows])]
    cells += [f"{reached:,.0f}" if reached is not None else "never"]
    known = (("seconds_per_1000", ".2f"), ("peak_mib", ".1f"))
    return [*cells, *(f"{cost[key]:{form}}" if key in cost else "" for key, form in known)]


def _long(known: Sequence[Line]) -> str:
    """How the runs went that are three times as long."""
    rows = []
    for line in (line for line in known if line.long):
        cost, best = max(line.long, key=lambda point: point[1])
        rows.append([line.label, f"{best:.2f}", f"{cost:,}", f"{line.long[-1][1]:.2f}", f"{line.long[-1][0]:,}"])
    return table(("trainer", "best gain", "at cost", "gain at the end", "at cost"), rows)


def _alike(pair: dict[str, Any]) -> str:
    way = f"{pair['updates'][0]} of them over all steps end {100 * pair['apart']:.2g} % of the way come apart"
    return f"{way}, at {pair['cost_ratio']:.2f} times the cost"


def _sweep(rows: Sequence[Row]) -> str:
    rates = sorted({row["learning_rate"] for row in rows})
    swept = {(row["variant"], row["learning_rate"]): row for row in rows}
    cells = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        runs = [swept[name, rate] for rate in rates]
        costs = dict.fromkeys(f"{row['curve'][-1]['cost']:,}" for row in runs)
        cells.append([name, *(f"{row['gain']:.2f}" for row in runs), ", ".join(costs)])
    return table(["trainer", *(f"{rate:g}" for rate in rates), "at cost"], cells)


def figure(known: Sequence[Line], path: Path) -> None:
    """Mean gain over seeds against cost, its range as a band; TRL's solid, ours dashed; thin: one seed, longer."""
    figure = Figure((12, 4.6))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, black_box in zip(axes, (False, True), strict=True):
        for line in (line for line in known if line.black_box == black_box):
            costs = line.grid()
            gains = [[gain_at(curve, cost) for curve in line.curves] for cost in costs]
            style = "-" if line.label.startswith("TRL") else "--"
            thousands = [cost / 1000 for cost in costs]
            (drawn,) = axis.plot(thousands, [statistics.mean(gain) for gain in gains], style, lw=2, label=line.label)
            color = drawn.get_color()
            if line.long:
                axis.plot(
                    [cost / 1000 for cost, _ in line.long], [gain for _, gain in line.long], style, color=color, lw=0.7
                )
            axis.fill_between(thousands, list(map(min, gains)), list(map(max, gains)), color=color, alpha=0.12, lw=0)
        axis.axhline(0, color="grey", lw=0.5)
        axis.set_title("black-box reward" if black_box else "differentiable reward", fontsize=10)
        axis.legend(fontsize=8, loc="best")
        axis.set_ylim(-3, 2.5)
    figure.supxlabel("denoiser forwards, thousands (a backward counts two)", fontsize=9)
    figure.supylabel("held-out gain", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
