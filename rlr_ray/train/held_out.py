"""Held-out chains: the same seeds and prompts every time, so that differences are paired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.kl import divergence_by_step
from rlr_ray.core.sampler import Trajectory
from rlr_ray.loggers.pictures import to_show
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.rewards.scores import Evaluation
from rlr_ray.train.engine import Engine
from rlr_ray.train.reference import numbered, picture_features

_COMPARED = 40  # first chains, whose divergence is measured, which takes as long as to sample them


@torch.no_grad()
def evaluate(
    engine: Engine, theta: Tensor, look: Callable[[range, Tensor], Any] = lambda indices, images: None
) -> Evaluation:
    """Sample the held-out chains at theta [P], in chunks of evaluation.chunk_size, and score them.

    `look` is shown each chunk's indices and images.
    """
    config, size = engine.config.evaluation, engine.config.sampled_at_once
    judges = engine.judges.to(engine.device)
    features_of = picture_features(engine)[1]
    scores: dict[str, list[Tensor]] = {label: [] for label in (*engine.rewards.labels, *judges.labels)}
    images, divergences, features, shown, invalid = [], [], [], [], 0
    for first in range(0, config.chains, size):
        indices = range(first, min(first + size, config.chains))
        trajectory, pictures = engine.sample(theta, indices)
        arguments = (pictures, *_asked(engine, indices))
        for mixture in (engine.rewards, judges):
            scored = mixture.score(*arguments)
            invalid += scored.invalid
            for label, row in zip(mixture.labels, scored.scores, strict=True):
                scores[label].append(row.cpu())
        if first < _COMPARED:
            divergences.append(_divergence(engine, theta, _first(trajectory, _COMPARED - first)))
        features.append(features_of(pictures).cpu())
        shown += arguments[1]
        if first < config.pictures:
            images += list(to_show(pictures[: config.pictures - first]).cpu())
        look(indices, pictures)
    engine.judges.to(torch.device("cpu"))  # training needs the room
    return Evaluation(
        {label: torch.cat(rows) for label, rows in scores.items()},
        torch.stack(images),
        torch.cat(divergences, dim=1),
        torch.cat(features),
        numbered(shown),
        invalid,
    )


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
        scores.append(engine.rewards.score(pictures, *_asked(engine, indices)).scores.cpu())
    return engine.rewards.weighted_sum(torch.cat(scores, dim=1))


def _asked(engine: Engine, indices: range) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts of held-out chains and their metadata."""
    _, prompts = engine.held_out(indices)
    return [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
