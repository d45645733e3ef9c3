"""Any plan's gradient estimate, measured: bias against a reference on the same chains, variance, cost.

n batches of B chains; a batch is whole groups of chains that share a baseline, computed in chunks, and one sample of
every statistic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.core.chunk import PLAIN, Forms
from rlr_ray.core.gradient import GradientEstimate, estimate_gradient
from rlr_ray.core.plan import Plan
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.positions import softmax_of_norms
from rlr_ray.core.sampler import Chains, Sampler
from rlr_ray.core.trust import RunningMeans
from rlr_ray.core.weighting import TermEstimate, mse_weight
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, principal_span, rollout, zeroth_order
from rlr_ray.lab.agreement import relative_bias
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.train.engine import Engine

LEAST_BATCHES = 8  # fewer say nothing of a variance


@dataclass(frozen=True)
class Subject:
    """The problem that plans are measured on: a sampler at one theta, and batches of chains by number."""

    sampler: Sampler
    theta: Tensor  # [P]
    batch: Callable[[int], Sequence[Chains]]  # its chunks
    groups: Tensor  # [B] chains of a batch that share a baseline
    baseline: Callable[[int], Tensor | None] = lambda number: None  # [m, B] of a batch, from earlier ones


@dataclass(frozen=True)
class Candidate:
    """A plan, and what an update under it would spend."""

    name: str
    shape: PlanShape
    directions: Directions | None = None  # of zeroth order
    checkpoint_steps: bool = False
    chains: int = 1  # an update
    pairs: int = 1  # perturbation pairs an update
    weights: Mapping[str, float | Literal["auto", "even"]] = field(default_factory=dict)  # of the terms; 1 if not given
    averaging: float = 1.0  # m of the auto weights
    position_weights: Sequence[float] | None = None  # [T] of an importance sub-chain
    biased: bool = False  # the expectation is not the whole gradient, whatever the reason
    recomputes: bool = False  # model.gradient_checkpointing: one more forward a backward
    forms: Forms = PLAIN
    zeroth_order_clip: float | None = None  # of a pair's difference, as a multiple of their median size

    def plan(self, batch: int) -> Plan:
        """The batch's plan; every batch is drawn as if it were an update of its own.

        A random depth is therefore each batch's own, where the chunks of an update spread theirs evenly: its variance
        is somewhat less in a run than measured here.
        """
        return self.shape.draw("lab", batch, position_weights=self.position_weights)

    def cost(self, plans: Sequence[Plan]) -> float:
        """Denoiser forwards a chain, a backward counted as two, averaged over plans; pairs are shared by the chains."""
        backward, pulled = 3 if self.recomputes else 2, self.forms.pull > 0
        steps = sum(plan.forwards(self.checkpoint_steps, pulled=pulled) + backward * plan.backwards for plan in plans)
        pairs = sum(plan.pair_forwards for plan in plans) * self.pairs / self.chains
        return (steps + pairs) / len(plans)


@dataclass(frozen=True)
class Samples:
    """A candidate's estimates on n batches."""

    plans: list[Plan]  # [n]
    terms: dict[str, Tensor]  # each [n, P]
    pair_variance: float | None = None  # of zeroth order, one pair, given the sub-chain's place
    spreads: dict[str, float] = field(default_factory=dict)  # means of `GradientEstimate.spreads`


def sample(subject: Subject, candidate: Candidate, batches: int) -> Samples:
    """Estimates by the product's own code, each of one batch, with one perturbation pair a chain."""
    estimates = [estimate_batch(subject, candidate, number) for number in range(batches)]
    names, size = list(estimates[0].terms), len(subject.groups)
    plans = [candidate.plan(number) for number in range(batches)]
    rows = {name: torch.stack([estimate.terms[name].gradient.cpu() for estimate in estimates]) for name in names}
    spreads = {name: statistics.mean(e.spreads.get(name, 1.0) for e in estimates) for name in names}
    pair_variance = None
    if "zeroth_order" in names:
        pair_variance = size * statistics.mean(e.terms["zeroth_order"].variance for e in estimates)
    return Samples(plans, rows, pair_variance, spreads)


def estimate_batch(subject: Subject, candidate: Candidate, number: int) -> GradientEstimate:
    plan, chunks = candidate.plan(number), subject.batch(number)
    return estimate_gradient(
        subject.sampler,
        subject.theta,
        {c: (plan, chains) for c, chains in enumerate(chunks)},
        subject.groups,
        lambda: _perturb(subject, candidate, number, plan, chunks),
        forms=candidate.forms,
        baseline=subject.baseline(number),
        checkpoint_steps=candidate.checkpoint_steps,
    )


def _perturb(subject: Subject, candidate: Candidate, number: int, plan: Plan, chunks: Sequence[Chains]) -> TermEstimate:
    """Zeroth order of one batch, each chain with a direction of its own."""
    directions = candidate.directions
    assert directions is not None, f"{candidate.name} has zeroth order and no directions"
    seeds: list[tuple[str | int, ...]] = []
    rewards: list[tuple[Tensor, Tensor]] = []
    for c, chains in enumerate(chunks):
        drawn = [("lab", "direction", number, c, i) for i in range(len(chains.x_start))]
        u = torch.stack([directions.draw(seed, subject.theta.dtype) for seed in drawn]).to(subject.theta)
        step = directions.step_size
        rewards.append(rollout(subject.sampler, subject.theta, plan, chains, u, step))
        seeds += drawn
    plus, minus = (torch.cat(parts).cpu() for parts in zip(*rewards, strict=True))
    clip = candidate.zeroth_order_clip
    return zeroth_order(directions, seeds, plus, minus, subject.theta.dtype, clip=clip)


@dataclass(frozen=True)
class Measurement:
    """Statistics of a candidate's estimates. Variances are per chain: an update of B chains has 1 / B of them."""

    name: str
    plan: str
    unbiased: bool
    batches: int
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
    """Statistics of a candidate's samples; `reference` [n, P] is the exact gradient of each batch of `size` chains."""
    rows = samples.terms
    variances = {name: size * variance(row) for name, row in rows.items()}
    if samples.pair_variance is not None:
        variances["zeroth_order"] = samples.pair_variance
    weights = {name: _weight(candidate, name, samples, variances[name]) for name in rows}
    total = torch.stack([weights[name] * row for name, row in rows.items()]).sum(0)
    more_pairs = candidate.chains / candidate.pairs - 1 if "zeroth_order" in rows else 0.0
    extra = more_pairs * weights.get("zeroth_order", 0.0) ** 2 * variances.get("zeroth_order", 0.0)
    bias, error = relative_bias(total, reference)
    return Measurement(
        candidate.name,
        str(candidate.shape),
        not candidate.biased,
        len(reference),
        candidate.cost(samples.plans),
        size * variance(total) + extra,  # measured with a pair a chain; an update may have more or fewer
        size * variance_se(total) * (1 + extra / max(size * variance(total), 1e-300)),
        variances,
        weights,
        bias,
        error,
        float(torch.cosine_similarity(total.mean(0), reference.mean(0), dim=0)),
    )


def variance(rows: Tensor) -> float:  # [n, P]
    """Unbiased estimate of a row's E |row - its expectation|^2."""
    return float((rows - rows.mean(0)).double().square().sum()) / (len(rows) - 1)


def variance_se(rows: Tensor) -> float:  # [n, P]
    """Standard error of `variance(rows)`."""
    squares = (rows - rows.mean(0)).double().square().sum(1)
    return float(squares.std()) / math.sqrt(len(rows))


def _weight(candidate: Candidate, name: str, samples: Samples, variance_of_one: float) -> float:
    """A term's weight, as `core.adaptive.Adaptive` has it once its statistics have settled."""
    stated, rows = candidate.weights.get(name, 1.0), samples.terms[name]
    if not isinstance(stated, str):
        return stated
    if stated == "even":
        of = "first_order" if "first_order" in samples.terms else name
        lengths = {each: float(samples.terms[each].norm(dim=1).mean()) for each in (of, name)}
        first, length = (lengths[each] / samples.spreads.get(each, 1.0) for each in (of, name))
        return first / length if first and length else 1.0
    signal = float(rows.mean(0).double().square().sum()) - variance(rows) / len(rows)
    spent = candidate.pairs if name == "zeroth_order" else candidate.chains
    return mse_weight(signal * spent / variance_of_one, candidate.averaging) if variance_of_one > 0 else 1.0


_FIRST_STEP = 1_000_000  # chains of updates that no run comes to
_GUIDE_BATCHES = 8  # apart from the measured ones; their gradients guide


def subject_of(
    engine: Engine, theta: Tensor, total: WeightedSum | None = None, *, whole_updates: bool = False
) -> Subject:
    """Batches of training chains at theta [P]: as many chunks as make whole groups of chains of one prompt.

    Or `whole_updates`, for what an update makes of all its chains together: a median, a common baseline, a length.
    A baseline over all of an update's chains is taken over the batch's. `total` is what is maximised; None: no reward
    is standardised.
    """
    train = engine.config.train
    half_order = engine.config.estimator.half_order
    by_prompt, by_running = half_order.by_prompt, half_order.baseline == "running"
    size = max(math.lcm(train.chunk_size, train.chains_per_prompt), 2)  # all chains of a prompt: they share variance
    size = train.chains if whole_updates else size
    groups = torch.arange(size) // (train.chains_per_prompt if by_prompt else size)

    def batch(number: int) -> list[Chains]:
        chunks = [range(first, first + train.chunk_size) for first in range(0, size, train.chunk_size)]
        return [engine.train_chains(_FIRST_STEP + number, chunk, total) for chunk in chunks]

    baseline = _running_baseline(engine, theta, batch, size) if by_running else lambda number: None
    return Subject(engine.sampler, theta, batch, groups.to(engine.device), baseline)


def prompts_of(engine: Engine, number: int, size: int) -> list[str]:
    """Prompts of a batch's chains."""
    return [prompt.text for prompt in engine.train_prompts(_FIRST_STEP + number, range(size))]


def _running_baseline(
    engine: Engine, theta: Tensor, batch: Callable[[int], Sequence[Chains]], size: int
) -> Callable[[int], Tensor | None]:
    """Each prompt's mean reward as earlier updates would leave it: over chains that no measurement uses."""

    @functools.cache
    def means() -> RunningMeans:
        earlier = RunningMeans()
        for number in range(-1, -1 - _GUIDE_BATCHES, -1):
            with torch.no_grad():
                rated = [one.rated(engine.sampler.sample(theta, *one.start).latents[-1]).cpu() for one in batch(number)]
            earlier.add(prompts_of(engine, number, size), torch.cat(rated, 1))
        return earlier

    return lambda number: means().before(prompts_of(engine, number, size), len(engine.rewards.labels))[0].to(theta)


def candidate_of(
    name: str, config: RunConfig, subject: Subject, guides: Tensor | None, position_norms: Sequence[float | None]
) -> Candidate:
    """A recipe's plan as its updates would have it, but for the law of an importance sub-chain.

    That comes from the true norms of the places' gradients, where a run has only noisy ones. A forward term is pulled
    to where it stands.
    """
    estimator, zeroth, half_order = config.estimator, config.estimator.zeroth_order, config.estimator.half_order
    shape = config.shape_on(subject.sampler.schedule)
    basis = guides if config.guided else None
    return Candidate(
        name,
        shape,
        Directions(len(subject.theta), zeroth.scale, basis) if shape.has_zeroth_order else None,
        estimator.checkpointed,
        config.train.chains,
        zeroth.count,
        config.weights,
        estimator.weight_averaging,
        softmax_of_norms(position_norms) if position_norms else None,
        config.biased,
        config.model.gradient_checkpointing,
        Forms(estimator.first_order.clip, None, half_order.weighting, half_order.pull, subject.theta),
        zeroth.clip,
    )


def guides_of(subject: Subject, config: RunConfig) -> Tensor:  # [k, P]
    """A span such as earlier updates leave early in a run, as `TrainState.directions` makes it.

    From gradients of the recipe's own plan on batches that no measurement uses.
    """
    shape = dataclasses.replace(config.shape_on(subject.sampler.schedule), rest="none")
    components = config.estimator.zeroth_order.components
    earlier = dataclasses.replace(subject, batch=lambda number: subject.batch(-1 - number))
    terms = sample(earlier, Candidate("guides", shape), max(_GUIDE_BATCHES, 2 * components)).terms
    if "half_order" in terms:
        basis = principal_span(terms["half_order"], components)
    else:
        basis = orthonormal_span([rows.mean(0) for rows in terms.values()])
    assert basis is not None, "gradients of norm 0"
    return basis
