"""The ablation's tables and figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ablation as ablation_runs  # beside this file, as the next
import matplotlib
from page import IMAGES, MACHINE, RESULTS, mean_se, table
from whole_runs import SWEEP_SEED, read

matplotlib.use("Agg")
from matplotlib import pyplot

ABLATION = """## The paper's ablation, repeated

`{command}`: `configs/digits.yaml` in one process (`cluster: none`, the same numbers as on Ray), {adapter}, under other
plans, each with the same cost in denoiser forwards (a backward counts two): that of {updates} updates of the demo.
Every plan's learning rate is the best of {rates} on a seed of its own. Gain: held-out reward after minus before, 200
paired chains; mean and standard error over the seeds {seeds}. Worst: the lowest held-out gain of any seed at any of
eight points along the way, after the first quarter. Judge: share of pictures that a classifier which is never trained
on reads as the digit asked for; {judge:.2f} before. Machine: {machine}.

{rows}

![Held-out gain along the way](images/{figure})

Learning rates: the gain on the sweep's seed.

{sweep}
"""


def ablation(name: str, command: str, adapter: str, figure: str) -> str:
    rows = read(RESULTS / name)
    runs = [row for row in rows if row["seed"] != SWEEP_SEED]
    if not runs:
        return ""
    order = [variant for variant in ablation_runs.VARIANTS if any(row["variant"] == variant for row in runs)]
    grouped = {variant: [row for row in runs if row["variant"] == variant] for variant in order}
    ablation_figure(grouped, IMAGES / figure)
    heads = ("plan", "learning rate", "updates", "seeds", "gain", "gain at half the cost", "worst", "judge")
    rates = sorted({row["learning_rate"] for row in rows})
    return ABLATION.format(
        command=command,
        adapter=adapter,
        updates=ablation_runs.UPDATES,
        rates=", ".join(f"{rate:g}" for rate in rates),
        seeds=", ".join(map(str, sorted({row["seed"] for row in runs}))),
        judge=statistics.mean(row["judge_before"] for row in runs),
        machine=MACHINE,
        rows=table(heads, [_ablation_row(variant, grouped[variant]) for variant in order]),
        figure=figure,
        sweep=_sweep_table(rows, rates),
    )


def gains(run: dict[str, Any]) -> dict[int, float]:
    """Held-out gain by number of updates."""
    return {int(step): value - run["reward_before"] for step, value in run["curve"].items()}


def _ablation_row(variant: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    half = [min(gains(run).items(), key=lambda point: abs(point[0] - run["steps"] / 2))[1] for run in runs]
    worst = min(value for run in runs for step, value in gains(run).items() if step >= run["steps"] / 4)
    final, judge = [run["gain"] for run in runs], [run["judge_after"] for run in runs]
    cells = [variant, f"{runs[0]['learning_rate']:g}", str(runs[0]["steps"]), str(len(runs))]
    return [*cells, mean_se(final), mean_se(half), f"{worst:.2f}", mean_se(judge)]


def _sweep_table(rows: Sequence[dict[str, Any]], rates: Sequence[float]) -> str:
    swept = {(row["variant"], row["learning_rate"]): row["gain"] for row in rows if row["seed"] == 100}
    variants = [variant for variant in ablation_runs.VARIANTS if any((variant, rate) in swept for rate in rates)]
    cells = [
        [f"{swept[variant, rate]:.2f}" if (variant, rate) in swept else "" for rate in rates] for variant in variants
    ]
    return table(["plan", *(f"{rate:g}" for rate in rates)], [[v, *c] for v, c in zip(variants, cells, strict=True)])


def ablation_figure(grouped: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean gain over seeds against the share of the cost, one panel a plan, single seeds thin."""
    columns = 4
    lines = math.ceil(len(grouped) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(12, 2.6 * lines), sharex=True, sharey=True, squeeze=False)
    for axis, (variant, runs) in zip(axes.flat, grouped.items(), strict=False):
        curves = [gains(run) for run in runs]
        for curve, run in zip(curves, runs, strict=True):
            axis.plot([step / run["steps"] for step in curve], list(curve.values()), color="tab:blue", alpha=0.3, lw=1)
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.mean(curve[step] for curve in curves) for step in steps]
        axis.plot([step / runs[0]["steps"] for step in steps], means, color="tab:blue", lw=2)
        axis.axhline(0, color="grey", lw=0.5)
        axis.set_title(variant, fontsize=9)
        axis.set_ylim(-4, 2.5)
    for axis in axes.flat[len(grouped) :]:
        axis.axis("off")
    figure.supxlabel("share of the cost", fontsize=9)
    figure.supylabel("held-out gain", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
