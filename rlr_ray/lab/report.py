"""Output of the laboratory and the planner: tables for a terminal, files for programs, a figure for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import yaml
from matplotlib.figure import Figure
from rich.table import Table

from rlr_ray.config.run import RunConfig
from rlr_ray.lab.agreement import Agreement
from rlr_ray.lab.compare import Result
from rlr_ray.lab.cost import Probe
from rlr_ray.lab.judge import trust_words
from rlr_ray.lab.options import Choice, Option
from rlr_ray.lab.plans import with_plan
from rlr_ray.lab.reference import Reference
from rlr_ray.utils.console import table
from rlr_ray.utils.files import disk_errors, replace_file

if TYPE_CHECKING:
    from rlr_ray.lab.certificate import Certified


def certificate_table(rows: Sequence[Certified]) -> Table:
    """A line for every plan: its terms' worst z-scores and the sum's, or a biased one's agreement; its bias."""
    heads = ("plan", "FO", "HO", "ZO", "sum", "bias along g", "variance", "verdict, or cosine and length")
    lines = table("Worst z-score over the exact gradient's direction and 20 random ones", heads)
    for row in rows:
        names = ("first_order", "half_order", "zeroth_order", "sum")
        z = ["" if row.biased else _z(row.z.get(name)) for name in names]
        bias = f"{row.relative_bias:+.3f} ± {row.relative_bias_se:.3f}"
        lines.add_row(row.name, *z, bias, f"{row.variance:.3g}", verdict_words(row))
    return lines


def verdict_words(row: Certified) -> str:
    if row.biased:
        cosine, length = row.agreement.cosine, row.agreement.length
        return f"{cosine:.2f} ± {row.agreement.cosine_se:.2f}, {length:.3g} ± {row.agreement.length_se:.2g}"
    return "ok" if row.ok else "FAILED"


def lab_table(results: Sequence[Result]) -> Table:
    """A line for every plan, unbiased ones first, least variance at equal cost on top."""
    heads = ("plan", "bias along g", "variance", "cost", "variance x cost", "cosine", "peak MiB", "batches")
    lines = table("Per chain; a backward costs two forwards; * biased", heads)
    for result in ranked(results):
        row = result.measurement
        lines.add_row(
            row.name + ("" if row.unbiased else " *"),
            _bias(row.relative_bias, row.relative_bias_se),
            f"{row.variance:.3g} ± {row.variance_se:.1g}",
            f"{row.cost:.1f}",
            f"{row.variance_cost:.3g}",
            f"{row.cosine:.2f}",
            f"{result.peak_mib:.1f}",
            str(row.batches),
        )
    return lines


def steps_table(title: str, rows: Sequence[dict[str, float]]) -> Table:
    """A line for every step, a column for every key."""
    lines = table(title, list(rows[0]))
    for row in rows:
        lines.add_row(*(f"{value:.3g}" for value in row.values()))
    return lines


def ranked(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda result: (not result.measurement.unbiased, result.measurement.variance_cost))


@disk_errors()
def write_lab(
    folder: Path,
    config: RunConfig,
    cost: float,
    reference: Reference,
    results: Sequence[Result],
    left_out: dict[str, str],
    profile: list[dict[str, float]],
) -> None:
    """lab.json, lab.parquet (a row a plan) and lab.png."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [result.row() for result in ranked(results)]
    whole = {
        "config": config.model_dump(mode="json"),
        "cost": cost,  # denoiser forwards spent on each plan
        "reference": {"kind": reference.kind, "batches": len(reference.rows)},
        "gradient_norm": float(reference.rows.mean(0).norm()),
        "trained_numbers": reference.rows.shape[1],
        "plans": rows,
        "left_out": left_out,
        "profile": profile,
    }
    write_json(folder / "lab.json", whole)
    cells = pyarrow.Table.from_pylist(rows)
    replace_file(folder / "lab.parquet", lambda file: pyarrow.parquet.write_table(cells, file))
    save_figure(folder / "lab.png", results)


def save_figure(path: Path, results: Sequence[Result]) -> None:
    """Variance at equal cost against memory, both on log axes; biased plans are hollow."""
    figure = Figure((11, 6))
    axis, legend = figure.subplots(1, 2, width_ratios=(3, 1))
    lines = []
    for number, result in enumerate(ranked(results), 1):
        row = result.measurement
        face = "tab:blue" if row.unbiased else "white"
        place = (result.peak_mib * 1.004**number, row.variance_cost)  # plans of equal memory side by side
        axis.scatter(*place, s=170, facecolors=face, edgecolors="tab:blue", zorder=2)
        shade = "white" if row.unbiased else "tab:blue"
        axis.annotate(str(number), place, ha="center", va="center", fontsize=8, color=shade, zorder=3)
        lines.append(f"{number:>2}  {row.name}")
    axis.set(xscale="log", yscale="log", xlabel="peak memory, MiB", ylabel="variance x cost")
    axis.set_title("Lower left is better; filled: unbiased, hollow: biased", fontsize=10)
    legend.axis("off")
    legend.text(0, 1, "\n".join(lines), va="top", fontsize=9, linespacing=1.6)
    figure.tight_layout()
    replace_file(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def choice_table(choice: Choice) -> Table:
    """The plans that fit, unbiased ones first; those that do not at the end."""
    heads = ("plan", "noise scale", "cost", "cosine", "price", "peak GiB", "s / update", "")
    lines = table("Price: noise scale x cost / cosine^2, in forwards; a backward costs two; * biased", heads)
    for option in sorted(choice.options, key=lambda option: not option.fits):
        mark = "chosen" if option is choice.best else "" if option.fits else "does not fit"
        lines.add_row(*_option_cells(option), mark, style="bold" if option is choice.best else None)
    return lines


def _option_cells(option: Option) -> list[str]:
    saving = " (checkpointed)" if option.keys["checkpoint_steps"] else ""
    cosine = "1" if option.unbiased else "not measured" if option.agreement is None else _cosine(option.agreement)
    return [
        option.name + saving + ("" if option.unbiased else " *"),
        f"{option.noise_scale:.3g}{_error(option.variance_se / option.signal)}",
        f"{option.cost:.1f}",
        cosine,
        f"{option.price:.3g}" if math.isfinite(option.price) else "",
        f"{option.peak_gib:.3g}",
        f"{option.seconds:.2f}",
    ]


def _cosine(measured: Agreement) -> str:
    return f"{measured.cosine:.2f} ± {measured.cosine_se:.2f}" if math.isfinite(measured.cosine_se) else "too noisy"


def choice_words(choice: Choice) -> str:
    """The choice and its reasons, and the paper's rule beside it."""
    best = choice.best
    budget = "no memory budget" if choice.budget_gib is None else f"budget {choice.budget_gib:g} GiB"
    lines = [f"{budget}: {best.name}: {best.plan}"]
    lines.append(
        f"predicted peak {best.peak_gib:.4g} GiB, measured on a real update {choice.measured_gib:.4g} GiB "
        f"({choice.error:+.1%}); variances from {choice.batches} batches in {choice.seconds:.0f} s; few may lack the "
        "rare chains with huge gradients (--batches)"
    )
    ties = [option.name for option in choice.options if option.can_be_chosen and _tied(option, best)]
    if ties:
        lines.append(f"within the errors of the variances: {', '.join(ties)}")
    for option in choice.options:
        if option.agreement is not None:
            lines.append(trust_words(option.name, *surest(option, choice.reference)))
    lines.append(_probe_words(choice.probe))
    if choice.rule:
        rule = choice.rule
        lines.append(
            f"the paper's closed form: h* = {rule.length} (B_h {rule.memory_half_gib:.3g} GiB, B_z "
            f"{rule.memory_zeroth_gib:.3g} GiB a step, V_h {rule.variance_half:.3g}, V_z {rule.variance_zeroth:.3g})"
        )
    return "\n".join(lines)


def surest(option: Option, reference: str) -> tuple[Agreement, str]:
    """The surest of a biased plan's agreements, and the name of what it agrees with."""
    assert option.agreement is not None
    agreements = [(option.agreement, reference)]
    agreements += [(option.beside_clipped, "clipped backpropagation")] if option.beside_clipped else []
    return min(agreements, key=lambda one: one[0].cosine_se if math.isfinite(one[0].cosine_se) else math.inf)


def _probe_words(probe: Probe) -> str:
    """Memory and time of a chunk in words."""
    memory, seconds = probe.memory, {name: f"{value:.3g}" for name, value in probe.seconds.items()}
    mib = {
        "one more step of a sub-chain": memory.half_order.further,
        "of plain first order": memory.first_order.further,
        "of checkpointed first order": memory.first_order_checkpointed.further,
        "a rollout": memory.rollout,
        "held all along": memory.held,
    }
    return (
        f"a chunk: {seconds['forward']} s a step forward, {seconds['backward']} s back, "
        f"{seconds['rollout']} s a rollout; "
        + ", ".join(f"{name} {value / 2**20:.3g} MiB" for name, value in mib.items())
    )


def _tied(option: Option, best: Option) -> bool:
    errors = [one.price * one.variance_se / one.variance for one in (option, best)]
    return option is not best and option.price - best.price < math.hypot(*errors)


@disk_errors()
def write_choice(folder: Path, config: RunConfig, choice: Choice) -> Path:
    """plan.json with every option, and plan.yaml, a recipe that `train` takes; its path."""
    write_json(folder / "plan.json", asdict(choice))
    chosen = with_plan(config, choice.best.keys)
    recipe = chosen.model_dump(mode="json", exclude_defaults=True)
    recipe["estimator"] = chosen.estimator.model_dump(mode="json") | {"preset": "custom"}  # every key is spelled out
    text = f"# {choice_words(choice).splitlines()[0]}\n" + yaml.safe_dump(recipe, sort_keys=False)
    replace_file(folder / "plan.yaml", lambda file: file.write_text(text, "utf-8"))
    return folder / "plan.yaml"


def as_chosen(config: RunConfig, folder: Path) -> RunConfig:
    """A recipe that is to choose its plan, with the plan that the run in `folder` chose when it started, if it did."""
    file = folder / "plan.json"
    if not file.is_file():
        return config
    return with_plan(config, json.loads(file.read_text("utf-8"))["best"]["keys"])


@disk_errors()
def write_json(path: Path, value: Any) -> None:
    """In a folder that is made if need be. Raises UserError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(value), indent=2)
    replace_file(path, lambda file: file.write_text(text + "\n", "utf-8"))


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _z(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _bias(value: float, error: float) -> str:
    return f"{value:+.2f}{_error(error)}" if math.isfinite(value) else "reference too noisy"


def _error(value: float) -> str:
    return f" ± {value:.1g}" if math.isfinite(value) else ""
