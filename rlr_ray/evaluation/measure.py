"""Base model and runs, sampled and scored on the same chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from rich.table import Table
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.evaluation.bootstrap import Comparison, Interval, compare, unit
from rlr_ray.evaluation.runs import Run
from rlr_ray.loggers.pictures import save_columns, save_comparison
from rlr_ray.prompts.load import Prompt
from rlr_ray.rewards.mixture import Mixture, reward_here
from rlr_ray.rewards.scores import Evaluation, mean_and_error
from rlr_ray.train.engine import Engine, chain_rows, pick_device
from rlr_ray.train.held_out import evaluate
from rlr_ray.utils.environment import versions
from rlr_ray.utils.files import replace_file

BASE = "base"
Look = Callable[[str, range, Tensor], Any]  # is shown whose chains these are, which, and their images


@dataclass(frozen=True)
class Measured:
    """What was found of the base model and of every run, n chains each."""

    config: RunConfig
    runs: list[Run]
    found: dict[str, Evaluation]  # by name of the run; the base model's first
    rewards: Mixture
    seeds: list[int]  # [n]
    prompts: list[Prompt]  # [n]
    groups: list[int]  # [n] which prompt each is, by number
    notes: list[str]  # for who reads the numbers

    def scores(self, name: str) -> dict[str, Tensor]:  # each [n]
        """By label: what is maximised as `reward` if that is a sum, each reward and each judge."""
        found = self.found[name]
        total = {"reward": found.of(self.rewards)} if len(self.rewards.labels) > 1 else {}
        return total | found.scores


def measure(config: RunConfig, runs: Sequence[Run], look: Look) -> Measured:
    """Sample and score the recipe's held-out chains; the base model is the first run's before its training.

    Rewards and judges are loaded once, models one after the other. What is maximised is standardised by the base
    model's scores of these chains.
    """
    device = pick_device(config.device)
    judges = {label: reward_here(label, judge, device) for label, judge in config.evaluation.judges.items()}
    engine = Engine(config.model_copy(update={"adapter": runs[0].config.adapter}), judges)
    thetas = {run.name: engine.model.load_adapter(run.folder) for run in runs if _fits(engine, run)}  # errors first
    rewards, chains = engine.rewards, range(config.evaluation.chains)
    found = {BASE: evaluate(engine, engine.model.initial_theta, partial(look, BASE))}
    rewards.standardise(torch.stack([found[BASE].scores[label] for label in rewards.labels]))
    (seeds, prompts), count = engine.held_out(chains), len(engine.held_out_prompts)
    notes = _notes(engine, runs)
    for run in runs:
        if not _fits(engine, run):
            del engine  # before another takes its place on the device
            engine = Engine(config.model_copy(update={"adapter": run.config.adapter}), judges | rewards.rewards)
        theta = thetas[run.name] if run.name in thetas else engine.model.load_adapter(run.folder)
        found[run.name] = evaluate(engine, theta, partial(look, run.name))
    return Measured(config, list(runs), found, rewards, seeds, prompts, [index % count for index in chains], notes)


def _notes(engine: Engine, runs: Sequence[Run]) -> list[str]:
    notes = [engine.prompt_note()]
    if engine.held_out_prompts is engine.prompts and engine.config.prompts == runs[0].config.prompts:
        notes.append(f"note: run {runs[0].name} was trained on these prompts; --prompts gives others")
    return [note for note in notes if note]


def _fits(engine: Engine, run: Run) -> bool:
    return engine.config.adapter == run.config.adapter


def trained_on(measured: Measured, run: Run, label: str) -> bool:
    """Whether a run was trained on what the label stands for here, so that a rise proves little."""
    config = measured.config
    if label not in config.rewards and label not in config.evaluation.judges:  # the sum
        return config.rewards == run.config.rewards
    own = config.rewards.get(label) or config.evaluation.judges[label]
    return any((own.name, own.options) == (reward.name, reward.options) for reward in run.config.rewards.values())


def comparisons(measured: Measured, level: float) -> dict[str, dict[str, Comparison]]:
    """Of each run, of each score: against the base model's."""
    base = measured.scores(BASE)
    return {
        run.name: {
            label: compare(base[label], scores, measured.groups, level)
            for label, scores in measured.scores(run.name).items()
        }
        for run in measured.runs
    }


def summary(measured: Measured, found: dict[str, dict[str, Comparison]], level: float) -> dict[str, Any]:
    """evaluate.json."""
    return {
        "level": level,
        "intervals_resample": unit(measured.groups),
        "chains": len(measured.seeds),
        "prompts": len(set(measured.groups)),
        "seed": measured.config.evaluation.seed,
        "base": _chains(measured, BASE),
        "runs": [
            {"run": run.name, "folder": str(run.folder)}
            | _chains(measured, run.name)
            | {
                "scores": {
                    label: asdict(row) | {"trained_on": trained_on(measured, run, label)}
                    for label, row in found[run.name].items()
                }
            }
            for run in measured.runs
        ],
        "config": measured.config.model_dump(mode="json"),
        "versions": versions(),
    }


def _chains(measured: Measured, name: str) -> dict[str, Any]:
    """What is said of chains themselves."""
    found = measured.found[name]
    kl, error = mean_and_error(found.divergence)
    return {"kl": kl, "kl_se": error, "diversity": found.diversity, "invalid": found.invalid}


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
