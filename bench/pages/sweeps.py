"""Tables and figures of the sweeps: the ablation, the surrogate, two rewards, lengths and perturbation scales."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.common import IMAGES, MACHINE, Row, mean_se, read_json, read_rows, standard_error, table, text
from bench.runs.sweep import CHOICE_SEED, load_sweep

Runs = Sequence[Row]


def runs_by_variant(name: str) -> dict[str, list[Row]]:
    """A sweep's runs on the seeds of the table, those of each variant together, in the order of sweeps.yaml."""
    sweep = load_sweep(name)
    rows = [row for row in read_rows(sweep.file) if row["seed"] != CHOICE_SEED]
    groups = {variant: [row for row in rows if row["variant"] == variant] for variant in sweep.variants}
    return {variant: runs for variant, runs in groups.items() if runs}


def seeds_of(groups: dict[str, list[Row]]) -> str:
    return ", ".join(map(str, sorted({row["seed"] for runs in groups.values() for row in runs})))


def ablation() -> str:
    groups = runs_by_variant("ablation")
    if not groups:
        return ""
    swept = read_rows(load_sweep("ablation").file)
    rates = sorted({row["learning_rate"] for row in swept})
    draw_ablation(groups)
    heads = ("plan", "learning rate", "updates", "seeds", "gain", "gain at half the cost", "worst", "judge")
    return text("ablation").format(
        rates=", ".join(f"{rate:g}" for rate in rates),
        seeds=seeds_of(groups),
        judge=statistics.mean(row["judge_before"] for runs in groups.values() for row in runs),
        machine=MACHINE,
        rows=table(heads, [_ablation_row(*item) for item in groups.items()]),
        sweep=_chosen_rates([row for row in swept if row["seed"] == CHOICE_SEED], list(groups), rates),
    )


def gains(run: Row) -> dict[int, float]:
    """Held-out gain by number of updates."""
    return {int(step): value - run["reward_before"] for step, value in run["curve"].items()}


def _first_cells(variant: str, runs: Runs) -> list[str]:
    return [variant, f"{runs[0]['learning_rate']:g}", str(runs[0]["steps"]), str(len(runs))]


def _ablation_row(variant: str, runs: Runs) -> list[str]:
    half = [min(gains(run).items(), key=lambda point: abs(point[0] - run["steps"] / 2))[1] for run in runs]
    worst = min(value for run in runs for step, value in gains(run).items() if step >= run["steps"] / 4)
    cells = [*_first_cells(variant, runs), mean_se([run["gain"] for run in runs]), mean_se(half), f"{worst:.2f}"]
    return [*cells, mean_se([run["judge_after"] for run in runs])]


def _chosen_rates(rows: Runs, variants: Sequence[str], rates: Sequence[float]) -> str:
    swept = {(row["variant"], row["learning_rate"]): f"{row['gain']:.2f}" for row in rows}
    lines = [[variant, *(swept.get((variant, rate), "") for rate in rates)] for variant in variants]
    return table(["plan", *(f"{rate:g}" for rate in rates)], lines)


def draw_ablation(groups: dict[str, list[Row]]) -> None:
    """Mean gain over seeds against the share of the cost, one panel a plan, single seeds thin."""
    columns = 4
    lines = math.ceil(len(groups) / columns)
    figure = Figure((12, 2.6 * lines))
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (variant, runs) in zip(axes.flat, groups.items(), strict=False):
        curves = [gains(run) for run in runs]
        for curve, run in zip(curves, runs, strict=True):
            axis.plot([step / run["steps"] for step in curve], list(curve.values()), color="tab:blue", alpha=0.3, lw=1)
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.mean(curve[step] for curve in curves) for step in steps]
        axis.plot([step / runs[0]["steps"] for step in steps], means, color="tab:blue", lw=2)
        axis.axhline(0, color="grey", lw=0.5)
        axis.set_title(variant, fontsize=9)
        axis.set_ylim(-4, 2.5)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    figure.supxlabel("share of the cost", fontsize=9)
    figure.supylabel("held-out gain", fontsize=9)
    figure.tight_layout()
    figure.savefig(IMAGES / "ablation.png", dpi=110)


def surrogate() -> str:
    groups = runs_by_variant("surrogate")
    heads = ("plan", "learning rate", "updates", "seeds", "gain", "judge", "correlation")
    rows = table(heads, [_surrogate_row(*item) for item in groups.items()])
    return text("surrogate").format(seeds=seeds_of(groups), machine=MACHINE, rows=rows) if groups else ""


def _surrogate_row(variant: str, runs: Runs) -> list[str]:
    late = [value for run in runs for value in run["surrogate_correlation"][-run["steps"] // 4 :] if value is not None]
    cells = [mean_se([run["gain"] for run in runs]), mean_se([run["judge_after"] for run in runs])]
    return [*_first_cells(variant, runs), *cells, f"{statistics.median(late):.2f}" if late else ""]


def rewards() -> str:
    groups = runs_by_variant("rewards")
    if len(groups) < len(load_sweep("rewards").variants):
        return ""
    heads = ("trained on", "updates", "seeds", "classifier", "JPEG, kB", "judge", "KL, nats", "warned")
    before = [
        statistics.mean(_score(run, label, "before") for runs in groups.values() for run in runs) for label in SCORES
    ]
    base = ["(base model)", "", "", *(f"{value:.3g}" for value in before), "0", ""]
    lines = [base, *(_rewards_row(*item) for item in groups.items())]
    return text("rewards").format(
        seeds=seeds_of(groups), machine=MACHINE, rows=table(heads, lines), words=_between(groups)
    )


SCORES = ("digits", "jpeg_compressibility", "digits_judge")


def _score(run: Row, label: str, when: str) -> float:
    """Before, after, gain or gain_se; of the one reward that a run trains on it is the run's own."""
    alone = {"before": "reward_before", "after": "reward_after"}.get(when, when)
    return run["scores"][label][when] if label in run["scores"] else run[alone]


def _rewards_row(variant: str, runs: Runs) -> list[str]:
    cells = [variant, str(runs[0]["steps"]), str(len(runs))]
    for label, digits in (("digits", 2), ("jpeg_compressibility", 4)):
        change = [_score(run, label, "gain") for run in runs]
        error = standard_error(change) if change[1:] else _score(runs[0], label, "gain_se")
        cells.append(f"{statistics.mean(change):+.{digits}f} ± {error:.{digits}f}")
    judged = mean_se([_score(run, "digits_judge", "after") for run in runs])
    warned = sum(any("gamed" in text for text in run["warnings"]) for run in runs)
    return [*cells, judged, f"{statistics.mean(run['kl'] for run in runs):.3g}", f"{warned} of {len(runs)}"]


def _between(groups: dict[str, list[Row]]) -> str:
    """Where the run on both rewards lies against the line between the two single ones."""
    (c, cj), (j, jj), (b, bj) = (
        [statistics.mean(_score(run, label, "gain") for run in groups[name]) for label in SCORES[:2]]
        for name in ("classifier", "JPEG", "both")
    )
    line = jj + (b - j) / (c - j) * (cj - jj)
    return (
        f"Between the two single runs, a mixture of models that gains {b:+.2f} of the classifier's score would gain "
        f"{line:+.4f} kB; the run on both gains {bj:+.4f} kB."
    )


def lengths() -> str:
    lengths, scales, rule = _by("length", "length"), _by("perturbation_scale", "scale"), read_json("closed_form.json")
    if not (lengths and scales and rule):
        return ""
    _draw(lengths, scales, rule)
    return text("lengths").format(
        forwards=load_sweep("length").forwards,
        seeds=len({row["seed"] for rows in lengths.values() for row in rows}),
        machine=MACHINE,
        lengths=table(
            ("h", "peak GiB", "updates", "gain"),
            [[str(h), f"{_peak(rows):.4f}", str(rows[0]["steps"]), _gain(rows)] for h, rows in lengths.items()],
        ),
        budgets=table(
            ("budget, GiB", "best measured h", "its gain", "h*", "gain at h*"),
            [_budget(float(budget), h, lengths) for budget, h in rule.items()],
        ),
        scales=table(("scale", "gain"), [[f"{scale:g}", _gain(rows)] for scale, rows in scales.items()]),
    )


def _by(name: str, key: str) -> dict[Any, list[Row]]:
    rows = read_rows(load_sweep(name).file)
    return {value: [row for row in rows if row[key] == value] for value in sorted({row[key] for row in rows})}


def _gain(rows: Runs) -> str:
    return mean_se([row["gain"] for row in rows])


def _peak(rows: Runs) -> float:
    return max(row["peak_memory_gib"] for row in rows)


def _budget(budget: float, rule: int, lengths: dict[int, list[Row]]) -> list[str]:
    fits = {h: rows for h, rows in lengths.items() if _peak(rows) <= budget}
    best = max(fits, key=lambda h: statistics.mean(row["gain"] for row in fits[h]))
    return [f"{budget:g}", str(best), _gain(fits[best]), str(rule), _gain(lengths[rule]) if rule in lengths else ""]


def _draw(lengths: dict[int, list[Row]], scales: dict[float, list[Row]], rule: dict[str, int]) -> None:
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, groups, name in ((left, lengths, "sub-chain length h"), (right, scales, "perturbation scale")):
        gains = {value: [row["gain"] for row in rows] for value, rows in groups.items()}
        means = [statistics.mean(values) for values in gains.values()]
        errors = [standard_error(values) for values in gains.values()]
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
