"""The whole method: the sum of the plan's terms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlr_ray.core.chunk import PLAIN, Begun, Forms, backpropagate, begin, scored
from rlr_ray.core.first_order import ClippedMean
from rlr_ray.core.half_order import group_advantages, leave_one_out
from rlr_ray.core.kl import divergence_gradient
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler, Trajectory
from rlr_ray.core.sums import ExactMean, Reduce, gathered, reduced, square_norm
from rlr_ray.core.weighting import Cut, TermEstimate, term_estimate

TERMS = ("first_order", "half_order", "zeroth_order", "kl_penalty")


@dataclass(frozen=True)
class Penalty:
    """Price of the chains' divergence from the base model's."""

    size: float  # reward per nat
    base: Tensor  # [P]
    steps: Sequence[int]  # at which it is measured


@dataclass(frozen=True)
class GradientEstimate:
    """The terms of one update and the rewards, equal in every process, and what only this process has."""

    terms: Mapping[str, TermEstimate]  # of TERMS, those that the plan has
    parts: Tensor  # [m, all B] of the unperturbed chains' rewards
    latents: Mapping[int, Tensor] = field(default_factory=dict)  # this process's chunks -> last latents [B, C, H, W]
    half_order_rows: Sequence[Tensor] = ()  # each [P], on the CPU: half order's means over parts of the chunks
    divergence: float | None = None  # nats a chain, if there is a penalty
    median: float | None = None  # norm of a chain's first-order gradient before it is cut, where chains are clipped
    of_surrogate: bool = False  # first order climbs a surrogate, of all or some rewards
    spreads: Mapping[str, float] = field(default_factory=dict)  # of what a term carries of the reward; see `_spreads`

    @property
    def rewards(self) -> Tensor:  # [all B]
        return self.parts.sum(0)

    @property
    def kind(self) -> str:
        """Its terms, and whether first order climbs a surrogate: gradients of one kind are of similar size."""
        return " + ".join(self.terms) + " of a surrogate" * self.of_surrogate

    def total(self, weights: Mapping[str, float]) -> Tensor:  # [P]
        """Weighted sum of the terms, of which there must be one; unbiased when every weight is 1."""
        total = torch.zeros_like(next(iter(self.terms.values())).gradient)
        for name, term in self.terms.items():
            total += weights.get(name, 1.0) * term.gradient
        return total

    def noise_shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Share of the total's squared norm that is each term's own variance, 0 .. 1; left out where not known."""
        norm = square_norm(self.total(weights)) if self.terms else 0.0
        shares = {name: weights.get(name, 1.0) ** 2 * term.variance / norm for name, term in self.terms.items() if norm}
        return {name: min(share, 1.0) for name, share in shares.items() if not math.isnan(share)}


def estimate_gradient(
    sampler: Sampler,
    theta: Tensor,  # [P]
    work: Mapping[int, tuple[Plan, Chains]],  # chunk's number -> its plan and chains; those that this process computes
    groups: Tensor,  # [all B] chains of a group share a baseline
    zeroth_order: Callable[[], TermEstimate | None],
    *,
    forms: Forms = PLAIN,
    baseline: Tensor | None = None,  # [m, all B] of each part, from earlier updates' chains; None: 0
    checkpoint_steps: bool = False,
    begun: Iterable[tuple[int, Begun]] | None = None,
    penalty: Penalty | None = None,
    half_order_rows: int = 0,
    reduce: Reduce = lambda value: value,
) -> GradientEstimate:
    """The paper's equation 6 for any plan: first order + half order + zeroth order, each averaged over its samples.

    The batch is cut in chunks of equal size; each is computed by whichever process has it, and only exact sums of their
    gradients are kept, so the result does not depend on how many processes share the work. Chunks' plans may differ in
    how deep first order goes. `begun` gives each chunk's number and what was sampled of it without gradients, wherever
    that was, in any order (None: here, chunk by chunk), and is asked for the next when a chunk has been backpropagated.
    A penalty's gradient is a term of its own. `zeroth_order` collects that term (None in the processes that do not hold
    it) and is called last: its rollouts run meanwhile. `half_order_rows` asks for half order's means over so many parts
    of the chunks.
    """
    plan, chains = next(iter(work.values()))
    count = len(groups) // len(chains.x_start)
    mean = ExactMean(theta, count, reduce)
    climbed = mean if forms.clip is None else ClippedMean(mean, forms.clip, reference=forms.typical)
    terms: dict[str, TermEstimate] = {}
    trajectories, rewards, branches = dict[int, Trajectory](), dict[int, Tensor](), dict[int, Tensor | None]()
    rows, divergence, median = list[Tensor](), None, None
    if begun is None:
        begun = begin(sampler, theta, work, kept=penalty.steps if penalty else ())
    for c, one in begun:
        branches[c] = one.branches
        trajectories[c], rewards[c], gradient = backpropagate(
            sampler, theta, *work[c], one, checkpoint_steps=checkpoint_steps, per_chain=climbed is not mean
        )
        if gradient is not None:
            climbed.add(c, gradient)
        del gradient
    if plan.has_first_order:
        terms["first_order"], median = _taken(climbed, count)
    *parts, left = gathered(rewards, count, reduce).transpose(0, 1).flatten(1)  # each [all B]
    if plan.has_half_order:
        advantages, scales = _advantages(torch.stack(parts), left, plan, chains, groups, baseline, forms.standardised)
        each = {
            c: functools.partial(
                scored, sampler, theta, *work[c], trajectory, advantages[:, c], forms, branches[c], scales[c]
            )
            for c, trajectory in trajectories.items()
        }
        terms["half_order"], rows = _half_order(each, advantages.shape[1], theta, mean, half_order_rows)
    if penalty is not None:
        divergence = _penalise(sampler, theta, trajectories, penalty, mean, reduce)
        terms["kl_penalty"] = term_estimate(*mean.take(range(count)), count)
    del mean, climbed
    if plan.zeroth_order:
        terms["zeroth_order"] = _everywhere(zeroth_order(), theta, reduce)
    latents = {c: trajectory.latents[-1].clone() for c, trajectory in trajectories.items()}  # not the whole chains
    ordered = {name: terms[name] for name in TERMS if name in terms}
    of_surrogate = plan.has_first_order and (bool(chains.trusted) or (plan.residual and chains.surrogate is not None))
    spreads = _spreads(torch.stack(parts), plan, chains)
    return GradientEstimate(ordered, torch.stack(parts), latents, rows, divergence, median, of_surrogate, spreads)


def _spreads(parts: Tensor, plan: Plan, chains: Chains) -> dict[str, float]:  # [m, all B]
    """Standard deviation of the parts that a term carries, in units of the whole's; none where all carry the same."""
    whole = float(parts.sum(0).std(correction=0))
    climbed = [part for part in range(len(parts)) if part not in chains.left]
    if not plan.residual or chains.surrogate is not None or not climbed or not chains.left or not whole:
        return {}
    first, others = (float(parts[carried].sum(0).std(correction=0)) / whole for carried in (climbed, chains.left))
    return {"first_order": first, "half_order": others, "zeroth_order": others}


def _taken(climbed: ExactMean | ClippedMean, count: int) -> tuple[TermEstimate, float | None]:
    """First order over all chunks, and the median of its chains' norms where they are clipped."""
    if isinstance(climbed, ExactMean):
        return term_estimate(*climbed.take(range(count)), count), None
    return climbed.take(count)


def _advantages(
    parts: Tensor,  # [m, all B]
    left: Tensor,  # [all B] of what first order leaves of the reward
    plan: Plan,
    chains: Chains,
    groups: Tensor,  # [all B]
    baseline: Tensor | None,  # [m, all B]
    standardised: Sequence[float] | None,  # [m]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """By how much a chain's reward is above its baseline and then the others of its group; 0 if branches say it.

    [2, chunks, B]: of the whole reward, and of what first order leaves of it. Beside them each chunk's scales [m, B],
    where parts are `standardised` within their groups.
    """
    size, scales = len(chains.x_start), [None] * (parts.shape[1] // len(chains.x_start))
    if standardised is not None:
        assert chains.surrogate is None, "what a surrogate leaves is none of the parts that are standardised"
        each, scale = group_advantages(parts, groups, standardised)
        both, scales = torch.stack([each.sum(0), each[chains.left].sum(0)]), list(scale.split(size, dim=1))
    elif plan.score == "branches":
        both = parts.new_zeros(2, parts.shape[1])
    else:
        whole = parts.sum(0)
        if baseline is not None:
            left = left - baseline[slice(None) if chains.surrogate else chains.left].sum(0)
            whole = whole - baseline.sum(0)
        both = torch.stack([leave_one_out(carried, groups) for carried in (whole, left)])
    return both.unflatten(1, (-1, size)), scales


def _half_order(
    scores: Mapping[int, Callable[[], Tensor]],  # chunk -> [P], of this process's chunks
    count: int,  # of all chunks
    theta: Tensor,  # [P]
    mean: ExactMean,
    parts: int,
) -> tuple[TermEstimate, list[Tensor]]:
    """Half order and, if they are asked for, its means over parts of the chunks, on the CPU."""
    square, rows = 0.0, list[Tensor]()
    chunks = [part.tolist() for part in torch.arange(count).tensor_split(min(max(parts, 1), count))]
    for part in chunks:
        for c in [c for c in part if c in scores]:
            mean.add(c, scores[c]())
        row, mean_square = mean.take(part)
        square += len(part) / count * mean_square
        rows.append(row.cpu() if parts else row)
    gradient = rows[0]
    if len(rows) > 1:
        gradient = torch.zeros_like(gradient)
        for part, row in zip(chunks, rows, strict=True):
            gradient.add_(row, alpha=len(part) / count)
    return term_estimate(gradient.to(theta.device), square, count), rows if parts else []


def _penalise(
    sampler: Sampler,
    theta: Tensor,
    trajectories: Mapping[int, Trajectory],
    penalty: Penalty,
    mean: ExactMean,
    reduce: Reduce,
) -> float:  # nats a chain
    """Add the gradients of what the chunks' chains pay, upwards."""
    nats = torch.zeros_like(mean.squares)  # [chunks]
    for c, trajectory in trajectories.items():
        slope, divergence = divergence_gradient(sampler, theta, penalty.base, trajectory, penalty.steps)
        mean.add(c, slope.mul_(-penalty.size))
        del slope  # [P], before the next one is made
        nats[c] = divergence.mean()
    return float(reduce(nats).mean())


def _everywhere(term: TermEstimate | None, theta: Tensor, reduce: Reduce) -> TermEstimate:
    """A term that one process holds, in all of them; adding the others' zeros changes no bit."""
    gradient, numbers = torch.zeros_like(theta), [0.0] * 3
    if term is not None:
        cut = term.cut or Cut(math.nan, math.nan)
        gradient, numbers = term.gradient.to(theta), [term.variance, cut.share, cut.length]
    variance, share, length = reduce(torch.tensor(numbers, dtype=torch.float64, device=theta.device)).tolist()
    return TermEstimate(reduced(gradient, reduce), variance, None if math.isnan(share) else Cut(share, length))
