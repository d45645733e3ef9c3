"""Held-out chains: the same seeds and prompts every time, so that differences are paired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.kl import divergence_by_step
from rlr_ray.core.sampler import Trajectory
from rlr_ray.loggers.pictures import to_show
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.rewards.scores import Evaluation
from rlr_ray.train.engine import Engine, Rollouts
from rlr_ray.train.reference import numbered, picture_features
from rlr_ray.train.sampling import Sampled
from rlr_ray.utils.memory import memory_errors

_COMPARED = 40  # first chains, whose divergence is measured, which takes as long as to sample them


Look = Callable[[range, Tensor], Any]  # is shown a chunk's indices and images


@dataclass(frozen=True)
class HeldOutRequest:
    """Held-out chains at one theta, with all that an evaluation makes of them. Indices are chains."""

    theta: Tensor  # [P]
    partial: bool = False

    def name(self, indices: range) -> str:
        return f"held-out chains {indices.start} to {indices.stop - 1}"

    @memory_errors()
    def run(self, engine: Engine, indices: range) -> Sampled:
        try:
            return _measured(engine, self.theta.to(engine.device), indices)
        finally:
            engine.judges.to(torch.device("cpu"))  # rollouts need the room


@torch.no_grad()
def evaluate(
    engine: Engine, theta: Tensor, look: Look = lambda indices, images: None, rollouts: Rollouts | None = None
) -> Evaluation:
    """Sample the held-out chains at theta [P], in chunks of evaluation.chunk_size, and score them.

    Here, or by `rollouts` if they sample as this process does; `look` is shown only what is drawn here.
    """
    config, size = engine.config.evaluation, engine.config.sampled_at_once
    chunks = [range(first, min(first + size, config.chains)) for first in range(0, config.chains, size)]
    if rollouts is not None and engine.config.actors_sample and not engine.config.actors_differ:
        results = list(rollouts(HeldOutRequest(theta.cpu()), chunks).results)
    else:
        results = [_measured(engine, theta, indices, look) for indices in chunks]
        engine.judges.to(torch.device("cpu"))  # training needs the room
    results.sort(key=lambda result: result.indices.start)

    def of(name: str, dim: int = 0) -> Tensor:
        return torch.cat([result.tensors[name] for result in results if name in result.tensors], dim)

    return Evaluation(
        {label: of(f"scores/{label}") for label in (*engine.rewards.labels, *engine.judges.labels)},
        of("images"),
        of("divergence", 1),
        of("features"),
        numbered(_asked(engine, range(config.chains))[0]),
        {label: of(f"replaced/{label}") for label in (*engine.rewards.labels, *engine.judges.labels)},
    )


@torch.no_grad()
def _measured(engine: Engine, theta: Tensor, indices: range, look: Look = lambda indices, images: None) -> Sampled:
    """A chunk's scores [b] by label, and of the chains that are asked for these, divergence, features and images."""
    config, judges = engine.config.evaluation, engine.judges.to(engine.device)
    trajectory, pictures = engine.sample(theta, indices)
    tensors = {"features": picture_features(engine)[1](pictures)}
    arguments = (pictures, *_asked(engine, indices))
    for mixture in (engine.rewards, judges):
        scored = mixture.score(*arguments)
        for label, row, marks in zip(mixture.labels, scored.scores, scored.replaced, strict=True):
            tensors |= {f"scores/{label}": row, f"replaced/{label}": marks}
    if indices.start < _COMPARED:
        tensors["divergence"] = _divergence(engine, theta, _first(trajectory, _COMPARED - indices.start))
    if indices.start < config.pictures:
        tensors["images"] = to_show(pictures[: config.pictures - indices.start])
    look(indices, pictures)
    return Sampled(indices, {name: value.cpu() for name, value in tensors.items()})


def _first(trajectory: Trajectory, count: int) -> Trajectory:
    conditioning = {name: value[:count] for name, value in trajectory.conditioning.items()}
    return Trajectory(trajectory.latents[:, :count], trajectory.noise[:, :count], conditioning)


def _divergence(engine: Engine, theta: Tensor, trajectory: Trajectory) -> Tensor:  # [T, B]
    base = engine.model.initial_theta
    if torch.equal(theta, base) and any(engine.model.schedule.sigma):
        return torch.zeros(len(engine.sampler), trajectory.latents.shape[1])
    return divergence_by_step(engine.sampler, theta, base, trajectory).cpu()


@torch.no_grad()
def standardised(engine: Engine) -> WeightedSum:
    """The maximised sum, by the base model's held-out chains where a reward is standardised; no judge is asked."""
    if not any(engine.rewards.normalized):
        return engine.rewards.weighted_sum()
    chains, size = engine.config.evaluation.chains, engine.config.sampled_at_once
    scores = []
    for first in range(0, chains, size):
        indices = range(first, min(first + size, chains))
        _, pictures = engine.sample(engine.model.initial_theta, indices)
        scores.append(engine.rewards.score(pictures, *_asked(engine, indices)).measured.cpu())
    return engine.rewards.weighted_sum(torch.cat(scores, dim=1))


def _asked(engine: Engine, indices: range) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts of held-out chains and their metadata."""
    _, prompts = engine.held_out(indices)
    return [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
