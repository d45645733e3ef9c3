"""A run's own model, reward and prompts as the laboratory's subject."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_ray.config import RunConfig
from rlr_ray.core.gradient import Chains
from rlr_ray.core.place import softmax_of_norms
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, principal_span
from rlr_ray.engine import Engine
from rlr_ray.lab.measure import Candidate, Subject, sample

_FIRST_STEP = 1_000_000  # chains of updates that no run comes to
_GUIDE_BATCHES = 8  # apart from the measured ones; their gradients guide


def subject_of(engine: Engine, theta: Tensor) -> Subject:
    """Batches of training chains at theta [P]: as many chunks as make whole groups of chains that share a baseline.

    A baseline over all of an update's chains is taken over the batch's.
    """
    train = engine.config.train
    by_prompt = engine.config.estimator.half_order.baseline == "prompt"
    size = math.lcm(train.chunk_size, train.chains_per_prompt) if by_prompt else max(train.chunk_size, 2)
    groups = torch.arange(size) // (train.chains_per_prompt if by_prompt else size)

    def batch(number: int) -> list[Chains]:
        chunks = [range(first, first + train.chunk_size) for first in range(0, size, train.chunk_size)]
        return [engine.train_chains(_FIRST_STEP + number, chunk) for chunk in chunks]

    return Subject(engine.model, theta, engine.model.schedule, batch, groups.to(engine.device))


def candidate_of(
    name: str, config: RunConfig, subject: Subject, guides: Tensor | None, place_norms: Sequence[float | None]
) -> Candidate:
    """A recipe's plan as its updates would have it, but for the law of an importance sub-chain.

    That comes from the true norms of the places' gradients, where a run has only noisy ones.
    """
    estimator, zeroth, shape = config.estimator, config.estimator.zeroth_order, config.plan_shape
    basis = guides if config.guided else None
    return Candidate(
        name,
        shape,
        Directions(len(subject.theta), zeroth.scale, basis) if shape.has_zeroth_order else None,
        estimator.checkpoint_steps,
        config.train.chains,
        zeroth.count,
        config.weights,
        estimator.weight_averaging,
        softmax_of_norms(place_norms, estimator.sub_chain.temperature) if place_norms else None,
        config.biased,
        config.model.gradient_checkpointing,
    )


def guides_of(subject: Subject, config: RunConfig) -> Tensor:  # [k, P]
    """A span such as earlier updates leave early in a run, as `TrainState.directions` makes it.

    From gradients of the recipe's own plan on batches that no measurement uses.
    """
    shape = dataclasses.replace(config.plan_shape, rest="none")
    components = config.estimator.zeroth_order.components
    earlier = dataclasses.replace(subject, batch=lambda number: subject.batch(-1 - number))
    terms = sample(earlier, Candidate("guides", shape), max(_GUIDE_BATCHES, 2 * components)).terms
    if components and "half_order" in terms:
        basis = principal_span(terms["half_order"], components)
    else:
        basis = orthonormal_span([rows.mean(0) for rows in terms.values()])
    assert basis is not None, "gradients of norm 0"
    return basis
