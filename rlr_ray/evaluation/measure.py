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
from rich.table import Table
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.evaluation.bootstrap import Comparison, Interval, compare, unit
from rlr_ray.evaluation.runs import BASE, Run
from rlr_ray.loggers.pictures import save_columns, save_comparison
from rlr_ray.prompts.prompt import Prompt
from rlr_ray.rewards.likeness import LIKENESS, REFERENCES, Reference, Summary, summarised
from rlr_ray.rewards.mixture import WeightedSum, reward_here
from rlr_ray.rewards.scores import Evaluation, mean_and_error
from rlr_ray.train.engine import Engine
from rlr_ray.train.held_out import evaluate
from rlr_ray.train.picture_engine import chain_rows, pick_device
from rlr_ray.train.reference import picture_features, real_reference
from rlr_ray.utils.console import table
from rlr_ray.utils.environment import versions
from rlr_ray.utils.files import replace_file

Look = Callable[[str, range, Tensor], Any]  # is shown whose chains these are, which, and their images


@dataclass(frozen=True)
class RunComparison:
    """The base model and every run on the same n chains. The base model stands apart: a run may have any name."""

    config: RunConfig
    runs: list[Run]
    base: Evaluation
    tuned: list[Evaluation]  # by run
    total: WeightedSum
    seeds: list[int]  # [n]
    prompts: list[Prompt]  # [n]
    groups: list[int]  # [n] which prompt each is, by number
    notes: list[str]  # for who reads the numbers
    likeness: list[Summary]  # by run, of its pictures to those of the base model and to real ones
    compared_by: str  # whose features

    @property
    def models(self) -> dict[str, Evaluation]:
        """By name, the base model's first."""
        return {BASE: self.base} | {run.name: tuned for run, tuned in zip(self.runs, self.tuned, strict=True)}

    def scores(self, model: Evaluation) -> dict[str, Tensor]:  # each [n]
        """By label: what is maximised as `reward` if that is a sum, each reward and each judge."""
        total = {"reward": model.of(self.total)} if len(self.total.labels) > 1 else {}
        return total | model.scores

    def of_run(self, number: int, level: float) -> dict[str, Comparison]:
        """A run's scores against the base model's, by label."""
        base, tuned = self.scores(self.base), self.scores(self.tuned[number])
        return {label: compare(base[label], scores, self.groups, level) for label, scores in tuned.items()}


def measure(config: RunConfig, runs: Sequence[Run], look: Look) -> RunComparison:
    """Sample and score the recipe's held-out chains; the base model is the first run's before its training.

    Rewards and judges are loaded once, models one after the other. What is maximised is standardised by the base
    model's scores of these chains.
    """
    device = pick_device(config.device)
    judges = {label: reward_here(label, judge, device) for label, judge in config.evaluation.judges.items()}
    engine = Engine(config.model_copy(update={"adapter": runs[0].config.adapter}), judges)
    thetas = {run.name: engine.model.load_adapter(run.folder) for run in runs if _fits(engine, run)}  # errors first
    rewards, chains = engine.rewards, range(config.evaluation.chains)
    real, compared_by = real_reference(engine), picture_features(engine)[0]
    base = evaluate(engine, engine.model.initial_theta, partial(look, BASE))
    total = rewards.weighted_sum(base.measured_rows(rewards.labels))
    references = {"base": Reference.base(base.pictures)} | ({"real": real} if real else {})
    like = {name: reference.of(base.pictures) for name, reference in references.items()}
    (seeds, prompts), count = engine.held_out(chains), len(engine.held_out_prompts)
    notes, tuned = _notes(engine, runs), []
    for run in runs:
        if not _fits(engine, run):
            del engine  # before another takes its place on the device
            engine = Engine(config.model_copy(update={"adapter": run.config.adapter}), judges | rewards.rewards)
        theta = thetas[run.name] if run.name in thetas else engine.model.load_adapter(run.folder)
        tuned.append(evaluate(engine, theta, partial(look, run.name)))
    likeness = [
        summarised(like, {name: reference.of(one.pictures) for name, reference in references.items()}) for one in tuned
    ]
    groups = [index % count for index in chains]
    return RunComparison(config, list(runs), base, tuned, total, seeds, prompts, groups, notes, likeness, compared_by)


def _notes(engine: Engine, runs: Sequence[Run]) -> list[str]:
    notes = [engine.prompt_note()]
    if engine.held_out_prompts is engine.prompts and engine.config.prompts == runs[0].config.prompts:
        notes.append(f"note: run {runs[0].name} was trained on these prompts; --prompts gives others")
    return [note for note in notes if note]


def _fits(engine: Engine, run: Run) -> bool:
    return engine.config.adapter == run.config.adapter


def trained_on(comparison: RunComparison, run: Run, label: str) -> bool:
    """Whether a run was trained on what the label stands for here, so that a rise proves little."""
    config = comparison.config
    if label not in config.rewards and label not in config.evaluation.judges:  # the sum
        return config.rewards == run.config.rewards
    judge = config.rewards.get(label) or config.evaluation.judges[label]
    return any((judge.name, judge.options) == (reward.name, reward.options) for reward in run.config.rewards.values())


def summary(comparison: RunComparison, results: Sequence[dict[str, Comparison]], level: float) -> dict[str, Any]:
    """evaluate.json. `results`: each run's `of_run`."""
    runs = []
    for run, model, like, result in zip(comparison.runs, comparison.tuned, comparison.likeness, results, strict=True):
        scores = {
            label: asdict(row) | {"trained_on": trained_on(comparison, run, label)} for label, row in result.items()
        }
        runs.append({"run": run.name, "folder": str(run.folder), **_chains(model), "likeness": like, "scores": scores})
    return {
        "level": level,
        "intervals_resample": unit(comparison.groups),
        "chains": len(comparison.seeds),
        "prompts": len(set(comparison.groups)),
        "seed": comparison.config.evaluation.seed,
        "base": _chains(comparison.base),
        "compared_by": comparison.compared_by,
        "runs": runs,
        "config": comparison.config.model_dump(mode="json"),
        "versions": versions(),
    }


def _chains(model: Evaluation) -> dict[str, Any]:
    """Figures of the chains themselves."""
    kl, error = mean_and_error(model.divergence)
    kls = {"kl": kl, "kl_se": error, "kl_by_step": model.kl_by_step}
    return kls | {"diversity": model.diversity, "invalid": model.invalid}


def score_table(comparison: RunComparison, results: Sequence[dict[str, Comparison]], level: float) -> Table:
    """A line for every run and score."""
    interval = f"{100 * level:g} % interval"
    heads = ("run", "score", "base", "tuned", "difference", interval, "wins", interval)
    lines = table("Same seeds and prompts; * the run was trained on it", heads, left=2)
    for run, result in zip(comparison.runs, results, strict=True):
        for label, row in result.items():
            mark = " *" if trained_on(comparison, run, label) else ""
            means = (f"{row.base:.4g}", f"{row.tuned:.4g}", f"{row.difference:+.3g}", _interval(row.interval, "+.3g"))
            lines.add_row(run.name, label + mark, *means, f"{row.win_rate:.1%}", _interval(row.win_interval, ".1%"))
    return lines


def chain_table(comparison: RunComparison) -> Table:
    """A line for every model: the divergence of its chains from the base model's, and its pictures' diversity."""
    by = f"diversity by {comparison.compared_by}"
    lines = table(None, ("model", "KL to the base, nats a chain", "most of it at step", by))
    for name, model in comparison.models.items():
        kl, error = mean_and_error(model.divergence)
        shown = "none: no noise" if math.isnan(kl) else f"{kl:.3g} ± {error:.1g}"
        diversity = "" if math.isnan(model.diversity) else f"{model.diversity:.4g}"
        lines.add_row(name, "0" if model is comparison.base else shown, _most(model.kl_by_step), diversity)
    return lines


def _most(by_step: list[float | None]) -> str:
    """The step with the largest part of the KL, and that part; "" without any."""
    known = {k: nats for k, nats in enumerate(by_step) if nats}
    if not known:
        return ""
    step = max(known, key=lambda k: known[k])
    return f"{step}: {known[step] / sum(known.values()):.0%}"


def likeness_table(comparison: RunComparison) -> Table:
    """A line for every run, reference and measure that is known."""
    heads = ("run", "pictures, against", "measure", "base", "tuned", "difference")
    lines = table(
        f"Without a judge, by the features of {comparison.compared_by}; distances over the reference's", heads, left=3
    )
    for run, likeness in zip(comparison.runs, comparison.likeness, strict=True):
        for reference, measures in likeness.items():
            for name, one in measures.items():
                change = f"{one['change']:+.3f} ± {one['change_se']:.3f}"
                means = f"{one['before']:.3f}", f"{one['after']:.3f}"
                lines.add_row(run.name, REFERENCES[reference], LIKENESS[name], *means, change)
    return lines


def _interval(interval: Interval, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def save_chains(folder: Path, comparison: RunComparison) -> None:
    """evaluate.parquet, a row a model and chain, the base model's first."""
    chains = chain_rows(comparison.seeds, comparison.prompts)
    rows = []
    for name, model in comparison.models.items():
        scores = {label: values.tolist() for label, values in comparison.scores(model).items()}
        for number, chain in enumerate(chains):
            cells = {f"score_{label}": values[number] for label, values in scores.items()}
            rows.append({"run": name, "chain": number, "negative_prompt": ""} | chain | cells)
    written = pyarrow.Table.from_pylist(rows)
    replace_file(folder / "evaluate.parquet", lambda file: pyarrow.parquet.write_table(written, file))


def save_pictures(folder: Path, comparison: RunComparison) -> None:
    """A grid of each run against the base model, and one of all side by side if there are several."""
    base = comparison.base.images
    titles = [prompt.text for prompt in comparison.prompts[: len(base)]]
    label = next(iter(comparison.scores(comparison.base)))
    captions = {
        name: f"{name}: {label} {float(comparison.scores(model)[label].mean()):.3g}"
        for name, model in comparison.models.items()
    }
    for run, model in zip(comparison.runs, comparison.tuned, strict=True):
        save_comparison(folder / f"base_{run.name}", base, model.images, titles, captions[BASE], captions[run.name])
    if len(comparison.runs) > 1:
        images = {name: model.images for name, model in comparison.models.items()}
        save_columns(folder / "side_by_side", images, titles)
