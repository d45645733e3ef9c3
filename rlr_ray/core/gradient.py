"""The whole method: the sum of the plan's terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.core.kl import divergence_gradient
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler, Trajectory
from rlr_ray.core.weighting import TermEstimate, average

TERMS = ("first_order", "half_order", "zeroth_order", "kl_penalty")
Reduce = Callable[[Tensor], Tensor]  # sum over the processes that share a step


@dataclass(frozen=True)
class Penalty:
    """What chains pay for their divergence from the base model's."""

    size: float  # reward per nat
    base: Tensor  # [P]
    steps: Sequence[int]  # at which it is measured


@dataclass(frozen=True)
class GradientEstimate:
    """The terms of one update and the rewards, equal in every process, and what only this process has."""

    terms: Mapping[str, TermEstimate]  # of TERMS, those that the plan has
    parts: Tensor  # [m, all B] of the unperturbed chains' rewards
    latents: Mapping[int, Tensor] = field(default_factory=dict)  # this process's chunks -> last latents [B, C, H, W]
    half_order_rows: Tensor | None = None  # [chunks, P] each chunk's own half-order gradient; None without half order
    divergence: float | None = None  # nats a chain, if there is a penalty

    @property
    def rewards(self) -> Tensor:  # [all B]
        return self.parts.sum(0)

    def total(self, weights: Mapping[str, float]) -> Tensor:  # [P]
        """Weighted sum of the terms, of which there must be one; unbiased when every weight is 1."""
        return torch.stack([weights.get(name, 1.0) * term.gradient for name, term in self.terms.items()]).sum(0)

    def noise_shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """How much of the total's squared norm is each term's own variance, 0 .. 1; left out where it is not known."""
        norm = float(self.total(weights).double().square().sum()) if self.terms else 0.0
        shares = {name: weights.get(name, 1.0) ** 2 * term.variance / norm for name, term in self.terms.items() if norm}
        return {name: min(share, 1.0) for name, share in shares.items() if not math.isnan(share)}


def estimate_gradient(
    sampler: Sampler,
    theta: Tensor,  # [P]
    work: Mapping[int, tuple[Plan, Chains]],  # chunk's number -> its plan and chains; those that this process computes
    groups: Tensor,  # [all B] chains of a group share a baseline
    zeroth_order: Callable[[], TermEstimate | None],
    *,
    checkpoint_steps: bool = False,
    sampled_together: int = 1,
    penalty: Penalty | None = None,
    reduce: Reduce = lambda value: value,
) -> GradientEstimate:
    """The paper's equation 6 for any plan: first order + half order + zeroth order, each averaged over its samples.

    The batch is cut in chunks of equal size; each is computed by whichever process has it, and their estimates are
    summed in the chunks' order, so the result does not depend on how many processes share the work. So many chunks in a
    row are `sampled_together`, without gradients, and belong to one process. Chunks' plans may differ in how deep first
    order goes. A penalty's gradient is a term of its own. `zeroth_order` collects that term (None in the processes that
    do not hold it) and is called last: its rollouts run meanwhile.
    """
    plan, chains = next(iter(work.values()))
    count = len(groups) // len(chains.x_start)
    # First order, half order and, if there is one, the penalty; other processes' chunks stay 0.
    gradients = theta.new_zeros(2 + (penalty is not None), count, len(theta))
    divergence = theta.new_zeros(count)
    trajectories, own = {}, {}
    for c, begun in _begun(sampler, theta, work, sampled_together):
        trajectories[c], gradients[0, c], own[c] = _backpropagate(sampler, theta, *work[c], begun, checkpoint_steps)
    *parts, left = reduce(_of_all_chunks(own, count))
    if plan.sub_chains:
        advantages = [leave_one_out(carried, groups).view(count, -1) for carried in (torch.stack(parts).sum(0), left)]
        for c, trajectory in trajectories.items():
            for sub_chain in plan.sub_chains:
                advantage = advantages[plan.leaves(sub_chain)][c]
                gradients[1, c] += half_order(sampler, theta, trajectory, sub_chain, advantage)
    if penalty is not None:
        for c, trajectory in trajectories.items():
            gradients[2, c], divergence[c] = _penalise(sampler, theta, trajectory, penalty)
    zeroth = zeroth_order() if plan.zeroth_order else None
    gradients, zeroth = _reduce_terms(gradients, zeroth, reduce)
    estimates = (average(gradients[0]), average(gradients[1]), zeroth, average(gradients[-1]))
    there = (plan.first_order, plan.sub_chains, plan.zeroth_order, penalty)
    terms = {name: term for name, term, owned in zip(TERMS, estimates, there, strict=True) if owned}
    latents = {c: trajectory.latents[-1].clone() for c, trajectory in trajectories.items()}  # not the whole chains
    rows = gradients[1] if plan.sub_chains else None
    nats = float(reduce(divergence).mean()) if penalty else None
    return GradientEstimate(terms, torch.stack(parts), latents, rows, nats)


def _penalise(
    sampler: Sampler, theta: Tensor, trajectory: Trajectory, penalty: Penalty
) -> tuple[Tensor, Tensor]:  # [P], nats a chain
    """Gradient of what a chunk's chains pay, upwards."""
    slope, nats = divergence_gradient(sampler, theta, penalty.base, trajectory, penalty.steps)
    return -penalty.size * slope, nats.mean()


def _of_all_chunks(own: Mapping[int, Tensor], count: int) -> Tensor:  # each [m, B] -> [m, all B]
    """This process's chunks in their places, 0 in the others'."""
    some = next(iter(own.values()))
    every = some.new_zeros(len(some), count, some.shape[1])
    for c, rows in own.items():
        every[:, c] = rows
    return every.flatten(1)


def _begun(
    sampler: Sampler, theta: Tensor, work: Mapping[int, tuple[Plan, Chains]], together: int
) -> Iterator[tuple[int, Trajectory]]:
    """Each chunk's number and its chains up to its first-order steps.

    Chunks whose chains would stop at different steps (first order's depth is random) are sampled one by one.
    """
    for _, numbers in groupby(work, lambda c: c // together):
        group = list(numbers)
        alike = len({work[c][0].first_order.start for c in group}) == 1
        for batch in [group] if alike else [[c] for c in group]:
            starts, stop = [work[c][1].start for c in batch], work[batch[0]][0].first_order.start
            yield from zip(batch, sampler.sample_together(theta, starts, stop=stop), strict=True)


def _backpropagate(
    sampler: Sampler,
    theta: Tensor,
    plan: Plan,
    chains: Chains,
    trajectory: Trajectory,
    checkpoint_steps: bool,
) -> tuple[Trajectory, Tensor, Tensor]:  # the whole trajectory, [P], [m + 1, B] the reward's parts and what is left
    """Run a chunk's first-order steps with gradients, meeting the reward or surrogate.

    What is left of the reward is what first order does not carry; all of it where it carries the whole.
    """
    gradient, met = torch.zeros_like(theta), None
    of_surrogate = chains.surrogate if plan.residual else None
    objective = chains.parts or chains.objective
    if plan.first_order:
        gradient, met, trajectory = first_order(
            sampler,
            theta,
            trajectory,
            of_surrogate or objective,
            checkpoint_steps=checkpoint_steps,
            step_weights=plan.step_weights,
        )
    if met is None or of_surrogate is not None:
        with torch.no_grad():
            parts = torch.atleast_2d(objective(trajectory.latents[-1]))
        return trajectory, gradient, torch.cat([parts, parts.sum(0, keepdim=True) - (0 if met is None else met)])
    parts = torch.atleast_2d(met)
    left = parts[list(chains.black_box)] if chains.black_box else parts
    return trajectory, gradient, torch.cat([parts, left.sum(0, keepdim=True)])


def _reduce_terms(gradients: Tensor, zeroth: TermEstimate | None, reduce: Reduce) -> tuple[Tensor, TermEstimate]:
    """One all-reduce for everything; adding other processes' zeros changes no bit."""
    parameters = gradients.shape[-1]
    own = gradients.new_zeros(parameters + 1)
    if zeroth is not None:
        own = torch.cat([zeroth.gradient.to(own), own.new_tensor([zeroth.variance])])
    flat = reduce(torch.cat([gradients.flatten(), own]))
    gradients = flat[: gradients.numel()].view_as(gradients)
    return gradients, TermEstimate(flat[-parameters - 1 : -1], float(flat[-1]))
