"""A run's own model, reward and prompts as the laboratory's subject."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_ray.config import RunConfig
from rlr_ray.core.gradient import Chains
from rlr_ray.core.place import softmax_of_norms
from rlr_ray.core.zeroth_order import Directions, orthonormal_span
from rlr_ray.engine import Engine
from rlr_ray.lab.measure import Candidate, Subject, sample

_FIRST_STEP = 1_000_000  # chains of updates that no run comes to
_GUIDE_CHUNKS = 8  # chunks apart from the measured ones whose gradients guide


def subject_of(engine: Engine, theta: Tensor) -> Subject:
    """Chunks of training chains at theta [P], prompts and baselines as in an update."""
    size, per_prompt = engine.config.train.chunk_size, engine.config.train.chains_per_prompt
    by_prompt = engine.config.estimator.half_order.baseline == "prompt" and size % per_prompt != 1
    groups = torch.arange(size) // (per_prompt if by_prompt else size)

    def chains(chunk: int) -> Chains:
        return engine.train_chains(_FIRST_STEP + chunk, range(size))

    return Subject(engine.model, theta, engine.model.schedule, chains, groups.to(engine.device))


def candidate_of(
    name: str, config: RunConfig, subject: Subject, guides: Tensor | None, place_norms: Sequence[float | None]
) -> Candidate:
    """A recipe's plan with the directions, weights and place that its updates would have."""
    estimator, zeroth, shape = config.estimator, config.estimator.zeroth_order, config.plan_shape
    basis = guides if zeroth.directions == "guided" else None
    weights = {"half_order": estimator.half_order.weight, "zeroth_order": zeroth.weight}
    return Candidate(
        name,
        shape,
        Directions(len(subject.theta), zeroth.scale, basis) if shape.has_zeroth_order else None,
        estimator.checkpoint_steps,
        config.train.chains,
        zeroth.count,
        {term: weight for term, weight in weights.items() if getattr(shape, f"has_{term}")},
        estimator.weight_averaging,
        softmax_of_norms(place_norms, estimator.sub_chain.temperature) if place_norms else None,
    )


def guides_of(subject: Subject, config: RunConfig) -> Tensor:  # [k, P]
    """A span such as earlier updates leave at the start of a run: their first-order and half-order gradients.

    Of the recipe's own plan, on chunks that no measurement uses.
    """
    shape = dataclasses.replace(config.plan_shape, rest="none" if config.plan_shape.has_half_order else "half_order")
    earlier = dataclasses.replace(subject, chains=lambda chunk: subject.chains(-1 - chunk))
    terms = sample(earlier, Candidate("guides", shape), _GUIDE_CHUNKS).terms
    basis = orthonormal_span([rows.mean(0) for rows in terms.values()])
    assert basis is not None, "gradients of norm 0"
    return basis
