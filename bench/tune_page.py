"""The reward over the sub-chain's length and over the perturbation scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from page import IMAGES, MACHINE, mean_se, read_json, table  # beside this file, as the next one
from tune import SEARCHES

from rlr_ray.config.tune import load_tune_config

LENGTH, SCALE = "estimator.sub_chain.length", "estimator.zeroth_order.scale"
Row = dict[str, Any]

TUNE = """## The sub-chain's length and the perturbation scale at equal cost

`python bench/tune.py`: `rlr-ray tune` over every point of `bench/searches/*.yaml`, the demo's job with one first-order
step, 40 chains and 40 directions an update, learning rate {rate:g}; every run spends {cost:,.0f} denoiser forwards (a
backward as two), so longer sub-chains get fewer updates. Gain in held-out reward over {seeds} seeds: mean ± standard
error. Machine: {machine}.

{lengths}

For each memory budget the best of these lengths that fits, beside the paper's closed form h* (equation 8, from
variances and memory measured at the start of a run):

{budgets}

The scale of the perturbations (relative to the adapter's numbers, see [estimators.md](estimators.md)), at h = 2:

{scales}

![Gain over the length and over the scale](images/tune.png)
"""


def tune() -> str:
    found = read_json("tune.json")
    if found is None:
        return ""
    lengths, scales = _by(found["lengths"], LENGTH), _by(found["scales"], SCALE)
    _draw(lengths, scales, found["closed_form"])
    config = load_tune_config(str(SEARCHES / "length.yaml"), [])
    return TUNE.format(
        rate=config.set["train.learning_rate"],
        cost=config.cost.denoiser_forwards,
        seeds=len({row["seed"] for row in found["lengths"]}),
        machine=MACHINE,
        lengths=table(("h", "peak GiB", "updates", "gain"), [_row(h, rows) for h, rows in lengths.items()]),
        budgets=table(
            ("budget, GiB", "best measured h", "its gain", "h*", "gain at h*"),
            [_budget(float(budget), h, lengths) for budget, h in found["closed_form"].items()],
        ),
        scales=table(("scale", "gain"), [[f"{scale:g}", _gain(rows)] for scale, rows in scales.items()]),
    )


def _by(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    return {value: [row for row in rows if row[key] == value] for value in sorted({row[key] for row in rows})}


def _gain(rows: Sequence[Row]) -> str:
    return mean_se([row["gain"] for row in rows])


def _row(h: int, rows: Sequence[Row]) -> list[str]:
    peak = max(row["peak_gib"] for row in rows)
    return [str(h), f"{peak:.4f}", str(rows[0]["updates"]), _gain(rows)]


def _budget(budget: float, rule: int, lengths: dict[int, list[Row]]) -> list[str]:
    fits = {h: rows for h, rows in lengths.items() if max(row["peak_gib"] for row in rows) <= budget}
    best = max(fits, key=lambda h: statistics.mean(row["gain"] for row in fits[h]))
    return [f"{budget:g}", str(best), _gain(fits[best]), str(rule), _gain(lengths[rule]) if rule in lengths else ""]


def _draw(lengths: dict[int, list[Row]], scales: dict[float, list[Row]], rule: dict[str, int]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, groups, name in ((left, lengths, "sub-chain length h"), (right, scales, "perturbation scale")):
        gains = {value: [row["gain"] for row in rows] for value, rows in groups.items()}
        means = [statistics.mean(found) for found in gains.values()]
        errors = [statistics.stdev(found) / math.sqrt(len(found)) for found in gains.values()]
        axis.errorbar(list(gains), means, errors, marker="o", capsize=3, label="gain ± standard error")
        axis.axhline(0, color="#999", linewidth=0.8)
        axis.set_xlabel(name)
    for number, h in enumerate(sorted(set(rule.values()))):
        budgets = " and ".join(f"{float(budget):g}" for budget, length in rule.items() if length == h)
        left.axvline(h, color=f"C{number + 1}", linestyle=":", label=f"h* for {budgets} GiB")
    left.set_ylabel("gain in held-out reward")
    left.legend(fontsize=7)
    right.set_xscale("log")
    figure.savefig(IMAGES / "tune.png", dpi=120)
    plt.close(figure)
