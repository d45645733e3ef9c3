"""What `rlr-ray evaluate` shows and leaves: tables for a terminal, files for programs, grids for people."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
from rich.table import Table

from rlr_ray.disk import replace_file
from rlr_ray.evaluate import mean_and_error
from rlr_ray.evaluation.compare import Comparison, Interval
from rlr_ray.evaluation.measure import BASE, Measured, trained_on
from rlr_ray.pictures import save_columns, save_comparison
from rlr_ray.sampler import chain_rows


def score_table(measured: Measured, found: dict[str, dict[str, Comparison]], level: float) -> Table:
    """One line a run and score."""
    interval = f"{100 * level:g} % interval"
    heads = ("run", "score", "base", "tuned", "difference", interval, "wins", interval)
    table = _table("Same seeds and prompts; * the run was trained on it", heads, left=2)
    for run in measured.runs:
        for label, row in found[run.name].items():
            mark = " *" if trained_on(measured, run, label) else ""
            means = (f"{row.base:.4g}", f"{row.tuned:.4g}", f"{row.difference:+.3g}", _interval(row.interval, "+.3g"))
            table.add_row(run.name, label + mark, *means, f"{row.win_rate:.1%}", _interval(row.win_interval, ".1%"))
    return table


def chain_table(measured: Measured) -> Table:
    """One line a model: how far its chains are from the base model's, and its pictures from each other."""
    by = "pixels" if measured.config.evaluation.clip is None else "CLIP"
    table = _table(None, ("model", "KL to the base, nats a chain", f"diversity by {by}"), left=1)
    for name, evaluation in measured.found.items():
        kl, error = mean_and_error(evaluation.divergence)
        shown = "none: no noise" if math.isnan(kl) else f"{kl:.3g} ± {error:.1g}"
        diversity = "" if math.isnan(evaluation.diversity) else f"{evaluation.diversity:.4g}"
        table.add_row(name, "0" if name == BASE else shown, diversity)
    return table


def _table(title: str | None, heads: tuple[str, ...], *, left: int) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < left else "right", no_wrap=True)
    return table


def _interval(interval: Interval, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def save_chains(folder: Path, measured: Measured) -> None:
    """evaluate.parquet, a row a model and chain, the base model's first."""
    chains = chain_rows(measured.seeds, measured.prompts)
    rows = []
    for name in measured.found:
        scores = {label: values.tolist() for label, values in measured.scores(name).items()}
        for number, chain in enumerate(chains):
            own = {f"score_{label}": values[number] for label, values in scores.items()}
            rows.append({"run": name, "chain": number, "negative_prompt": ""} | chain | own)
    table = pyarrow.Table.from_pylist(rows)
    replace_file(folder / "evaluate.parquet", lambda file: pyarrow.parquet.write_table(table, file))


def save_pictures(folder: Path, measured: Measured) -> None:
    """A grid of each run against the base model, and one of all side by side if there are several."""
    images = {name: evaluation.images for name, evaluation in measured.found.items()}
    titles = [prompt.text for prompt in measured.prompts[: len(images[BASE])]]
    label = next(iter(measured.scores(BASE)))
    means = {name: f"{name}: {label} {float(measured.scores(name)[label].mean()):.3g}" for name in images}
    for run in measured.runs:
        save_comparison(
            folder / f"base_{run.name}", images[BASE], images[run.name], titles, means[BASE], means[run.name]
        )
    if len(measured.runs) > 1:
        save_columns(folder / "side_by_side", images, titles)
