"""Base model and runs, sampled and scored on the same chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config import RunConfig
from rlr_ray.engine import Engine
from rlr_ray.evaluate import Evaluation, evaluate, mean_and_error
from rlr_ray.evaluation.compare import Comparison, compare, unit
from rlr_ray.evaluation.runs import Run
from rlr_ray.prompts import Prompt
from rlr_ray.results import versions
from rlr_ray.rewards.mixture import Mixture, reward_here
from rlr_ray.sampler import pick_device

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
