"""Any plan's gradient estimate, measured: bias against a reference on the same chains, variance, cost.

n chunks of B chains; a chunk is one sample of every statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlr_ray.core.chain import Denoiser
from rlr_ray.core.gradient import Chains, GradientEstimate, estimate_gradient, rollout
from rlr_ray.core.plan import Plan, PlanShape
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.terms import TermEstimate, mse_weight
from rlr_ray.core.zeroth_order import Directions, zeroth_order


@dataclass(frozen=True)
class Subject:
    """What plans are measured on: a denoiser at one theta, and chunks of chains by number, always the same."""

    denoiser: Denoiser
    theta: Tensor  # [P]
    schedule: Schedule
    chains: Callable[[int], Chains]
    groups: Tensor  # [B] chains of a chunk that share a baseline


@dataclass(frozen=True)
class Candidate:
    """A plan, and what an update under it would spend."""

    name: str
    shape: PlanShape
    directions: Directions | None = None  # of zeroth order
    checkpoint_steps: bool = False
    chains: int = 1  # an update
    pairs: int = 1  # perturbation pairs an update
    weights: Mapping[str, float | Literal["auto"]] = field(default_factory=dict)  # of the terms; 1 if not given
    averaging: float = 1.0  # m of the auto weights
    place_weights: Sequence[float] | None = None  # [T] of an importance sub-chain

    @property
    def guided(self) -> bool:
        return self.shape.has_zeroth_order and self.directions is not None and self.directions.basis is not None

    @property
    def biased(self) -> bool:
        """True if the expectation is not the whole gradient, whatever the reason."""
        return self.shape.biased or self.guided or "auto" in self.weights.values()

    def plan(self, chunk: int) -> Plan:
        """The chunk's plan; every chunk is drawn as if it were an update of its own."""
        return self.shape.draw("lab", chunk, place_weights=self.place_weights)

    def cost(self, plans: Sequence[Plan]) -> float:
        """Denoiser forwards a chain, a backward counted as two, averaged over plans; pairs are shared by the chains."""
        steps = sum(plan.forwards(self.checkpoint_steps) + 2 * plan.backwards for plan in plans) / len(plans)
        return steps + (2 * self.shape.steps * self.pairs / self.chains if self.shape.has_zeroth_order else 0)


@dataclass(frozen=True)
class Samples:
    """A candidate's estimates on n chunks."""

    plans: list[Plan]  # [n]
    terms: dict[str, Tensor]  # each [n, P]


def sample(subject: Subject, candidate: Candidate, chunks: int) -> Samples:
    """Estimates by the product's own code, each of one chunk's chains, with one perturbation pair a chain."""
    estimates = [estimate_chunk(subject, candidate, chunk) for chunk in range(chunks)]
    names = estimates[0].terms
    plans = [candidate.plan(chunk) for chunk in range(chunks)]
    return Samples(plans, {name: torch.stack([e.terms[name].gradient.cpu() for e in estimates]) for name in names})


def estimate_chunk(subject: Subject, candidate: Candidate, chunk: int) -> GradientEstimate:
    plan, chains = candidate.plan(chunk), subject.chains(chunk)
    return estimate_gradient(
        subject.denoiser,
        subject.theta,
        subject.schedule,
        {0: (plan, chains)},
        subject.groups,
        lambda: _perturb(subject, candidate, chunk, plan, chains),
        checkpoint_steps=candidate.checkpoint_steps,
    )


def _perturb(subject: Subject, candidate: Candidate, chunk: int, plan: Plan, chains: Chains) -> TermEstimate:
    """Zeroth order of one chunk, each chain with a direction of its own."""
    directions = candidate.directions
    assert directions is not None, f"{candidate.name} has zeroth order and no directions"
    seeds = [("lab", "direction", chunk, i) for i in range(len(chains.x_start))]
    u = torch.stack([directions.draw(seed, subject.theta.dtype) for seed in seeds]).to(subject.theta)
    plus, minus = rollout(subject.denoiser, subject.theta, subject.schedule, plan, chains, u, directions.step_size)
    return zeroth_order(directions, seeds, plus.cpu(), minus.cpu(), subject.theta.dtype)


@dataclass(frozen=True)
class Measurement:
    """What a candidate's estimates were like. Variances are per chain: an update of B chains has 1 / B of them."""

    name: str
    plan: str
    unbiased: bool
    chunks: int
    cost: float  # denoiser forwards a chain, a backward as two
    variance: float  # E |estimate - its expectation|^2
    variance_se: float
    term_variances: dict[str, float]  # first and half order per chain, zeroth order per pair; before weighting
    weights: dict[str, float]
    relative_bias: float  # (E estimate - g) . g / |g|^2
    relative_bias_se: float
    cosine: float  # of the estimates' average with g

    @property
    def variance_cost(self) -> float:
        """Variance at equal cost: that of an update which costs one denoiser forward."""
        return self.variance * self.cost


def summarise(candidate: Candidate, samples: Samples, reference: Tensor, size: int) -> Measurement:
    """Statistics of a candidate's samples; `reference` [n, P] is the exact gradient of each chunk of `size` chains."""
    rows = samples.terms
    variances = {name: size * variance(row) for name, row in rows.items()}
    weights = {name: _weight(candidate, name, row, variances[name]) for name, row in rows.items()}
    total = torch.stack([weights[name] * row for name, row in rows.items()]).sum(0)
    bias, error = relative_bias(total, reference)
    return Measurement(
        candidate.name,
        str(candidate.shape),
        not candidate.biased,
        len(reference),
        candidate.cost(samples.plans),
        *_update_variance(candidate, rows, weights, size),
        variances,
        weights,
        bias,
        error,
        float(torch.cosine_similarity(total.mean(0), reference.mean(0), dim=0)),
    )


def variance(rows: Tensor) -> float:  # [n, P]
    """Unbiased estimate of a row's E |row - its expectation|^2."""
    return float((rows - rows.mean(0)).double().square().sum()) / (len(rows) - 1)


def _spent(candidate: Candidate, name: str) -> int:
    """How many samples of a term an update averages."""
    return candidate.pairs if name == "zeroth_order" else candidate.chains


def _weight(candidate: Candidate, name: str, rows: Tensor, spread: float) -> float:
    stated = candidate.weights.get(name, 1.0)
    if not isinstance(stated, str):
        return stated
    signal = float(rows.mean(0).double().square().sum()) - variance(rows) / len(rows)
    return mse_weight(signal, spread / _spent(candidate, name), candidate.averaging)


def _update_variance(
    candidate: Candidate, rows: Mapping[str, Tensor], weights: Mapping[str, float], size: int
) -> tuple[float, float]:
    """Variance of an update times its chains, with its standard error.

    Zeroth order's directions are independent of all else, so its variance adds up, whatever number of pairs it has.
    """
    own = [weights[name] * row for name, row in rows.items() if name != "zeroth_order"]
    parts = [torch.stack(own).sum(0)] if own else []
    scales = [1.0] * len(parts)
    if "zeroth_order" in rows:
        parts.append(weights["zeroth_order"] * rows["zeroth_order"])
        scales.append(candidate.chains / candidate.pairs)
    spread = sum(scale * variance(part) for scale, part in zip(scales, parts, strict=True))
    errors = [scale * variance_se(part) for scale, part in zip(scales, parts, strict=True)]
    return size * spread, size * math.hypot(*errors)


def variance_se(rows: Tensor) -> float:  # [n, P]
    """Standard error of `variance(rows)`."""
    squares = (rows - rows.mean(0)).double().square().sum(1)
    return float(squares.std()) / math.sqrt(len(rows))


def relative_bias(estimates: Tensor, reference: Tensor) -> tuple[float, float]:  # [n, P], [n, P]
    """Mean and standard error of (estimate - exact) . g / |g|^2, paired chunk by chunk; g the exact ones' mean."""
    g = reference.mean(0)
    along = ((estimates - reference) @ g / (g @ g)).double()
    return float(along.mean()), float(along.std()) / math.sqrt(len(along))
