"""A chunk's share of the gradient: its chains are sampled, first order backpropagated and half order computed."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from rlr_ray.core.first_order import first_order, linear_adjoint
from rlr_ray.core.forward_term import Weighting, forward_term
from rlr_ray.core.half_order import branch_advantages, half_order
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler, Trajectory


@dataclass(frozen=True)
class Forms:
    """Variants of the terms on the steps that a plan gives them; the defaults are the paper's."""

    clip: float | None = None  # first order: a chain's gradient at most so many times their median norm
    typical: float | None = None  # that norm in earlier updates, where an update's chains' gradients are not all kept
    weighting: Weighting = "uniform"  # forward term: of a drawn step
    pull: float = 0.0  # forward term: how much its predictions are held to the reference's
    reference: Tensor | None = None  # [P]
    behind: bool = False  # half order by path: the chains are another theta's
    # half order: the parts' weights [m]; each part is standardised within its group; None: their sum is compared
    standardised: tuple[float, ...] | None = None


PLAIN = Forms()


@dataclass(frozen=True)
class Begun:
    """A chunk's chains up to first order's steps, and all that is known of them without a gradient."""

    trajectory: Trajectory  # with the latents that terms read
    parts: Tensor | None = None  # [m, B] of the reward, of whole chains that no gradient of it meets
    # [n, m + 2, B] half order's advantages: of each part, of the whole reward, of what first order leaves of it
    branches: Tensor | None = None


def begin(
    sampler: Sampler,
    theta: Tensor,  # [P]
    work: Mapping[int, tuple[Plan, Chains]],
    together: int = 1,
    kept: Collection[int] = (),
) -> Iterator[tuple[int, Begun]]:
    """Each chunk's number and its chains up to its first-order steps: all sampling that needs no gradient.

    Chunks whose chains would stop at different steps (first order's depth is random) are sampled one by one. Latents
    stay at the steps that the plans read and at those `kept`.
    """
    for _, numbers in groupby(work, lambda c: c // together):
        group = list(numbers)
        alike = len({work[c][0].sampled for c in group}) == 1
        for batch in [group] if alike else [[c] for c in group]:
            starts, stop = [work[c][1].start for c in batch], work[batch[0]][0].sampled
            read = (
                None if _branches_at_once(work[batch[0]][0]) else {*kept, *(k for c in batch for k in work[c][0].read)}
            )
            for c, trajectory in zip(batch, sampler.sample_together(theta, starts, stop=stop, kept=read), strict=True):
                yield c, _rated(sampler, theta, *work[c], trajectory, kept)


def _branches_at_once(plan: Plan) -> bool:
    """Whether partners of whole chains are drawn as soon as these are."""
    return plan.score == "branches" and plan.sampled == plan.steps


@torch.no_grad()
def _rated(
    sampler: Sampler, theta: Tensor, plan: Plan, chains: Chains, trajectory: Trajectory, kept: Collection[int]
) -> Begun:
    """Chains with what their rewards say, if they are whole and no gradient of those is asked."""
    if plan.has_first_order:
        return Begun(trajectory)
    parts, branches = chains.rated(trajectory.latents[-1]), None
    if _branches_at_once(plan):
        branches = _branch_advantages(sampler, theta, plan, chains, trajectory, parts)
        trajectory = trajectory.at_steps({*kept, *plan.read})
    return Begun(trajectory, parts, branches)


def backpropagate(
    sampler: Sampler,
    theta: Tensor,  # [P]
    plan: Plan,
    chains: Chains,
    begun: Begun,
    *,
    checkpoint_steps: bool,
    per_chain: bool,
) -> tuple[Trajectory, Tensor, Tensor | None]:
    """The whole chains; the reward's parts and what is left of it [m + 1, B]; first order [P], or [B, P] per chain.

    Runs first order's steps with gradients, meeting the rewards or their surrogate. What is left of the reward is what
    first order does not carry; all of it where that carries the whole.
    """
    trajectory, of_surrogate = begun.trajectory, chains.surrogate if plan.residual else None
    climbed, gradient, met = of_surrogate or chains.carried, None, None
    weights = plan.step_weights
    if plan.adjoint_steps:
        gradient, met = linear_adjoint(
            sampler, theta, trajectory, climbed, plan.adjoint_steps, step_weights=weights, per_chain=per_chain
        )
    elif plan.first_order:
        gradient, met, trajectory = first_order(
            sampler,
            theta,
            trajectory,
            climbed,
            checkpoint_steps=checkpoint_steps,
            step_weights=weights,
            per_chain=per_chain,
        )
    if met is None or of_surrogate is not None:
        with torch.no_grad():
            parts = chains.rated(trajectory.latents[-1]) if begun.parts is None else begun.parts
        left = parts.sum(0, keepdim=True) - (0 if met is None else met)
        return trajectory, torch.cat([parts, left]), gradient
    parts = torch.atleast_2d(met)
    parts = parts[: len(parts) - len(chains.trusted)]
    left = parts[chains.left].sum(0, keepdim=True)
    return trajectory, torch.cat([parts, left]), gradient


def scored(
    sampler: Sampler,
    theta: Tensor,
    plan: Plan,
    chains: Chains,
    trajectory: Trajectory,
    advantages: Tensor,  # [2, B]
    forms: Forms,
    branches: Tensor | None = None,  # [n, m + 2, B] in their place, where they are known
    scale: Tensor | None = None,  # [m, B] by which each part's branches are multiplied
) -> Tensor:  # [P]
    """Half order of one chunk, by the plan's score."""
    if plan.score == "forward":
        assert chains.draws is not None, "chains of a forward term draw its steps and noises"
        steps, noise = chains.draws(plan.forward_steps, plan.draws)  # [B, K], [K, B, C, H, W]
        leaves = torch.tensor([plan.leaves(k) for k in range(plan.steps)], device=steps.device)[steps]
        return forward_term(
            sampler,
            theta,
            trajectory.latents[-1],
            chains.conditioning,
            torch.where(leaves.to(advantages.device), advantages[1, :, None], advantages[0, :, None]),
            steps,
            noise,
            weighting=forms.weighting,
            scale=len(plan.forward_steps) / plan.draws,
            pull=forms.pull,
            reference=forms.reference,
        )
    of = list(advantages[[int(plan.leaves(sub_chain.start)) for sub_chain in plan.sub_chains]])  # each [B]
    if plan.score == "branches":
        if branches is None:
            branches = _branch_advantages(sampler, theta, plan, chains, trajectory)
        if scale is not None:
            each_part = branches[:, :-2] * scale
            branches = torch.stack([each_part.sum(1), each_part[:, chains.left].sum(1)], dim=1)
        of = [one[int(plan.leaves(at.start)) - 2] for one, at in zip(branches, plan.sub_chains, strict=True)]
    weights = plan.sub_chain_weights or (1.0,) * len(plan.sub_chains)
    each = (
        half_order(
            sampler, theta, trajectory, sub_chain, weight * advantage, behind=forms.behind and plan.score == "path"
        )
        for sub_chain, weight, advantage in zip(plan.sub_chains, weights, of, strict=True)
    )
    return functools.reduce(Tensor.add_, each)


@torch.no_grad()
def _branch_advantages(
    sampler: Sampler,
    theta: Tensor,
    plan: Plan,
    chains: Chains,
    trajectory: Trajectory,
    parts: Tensor | None = None,  # [m, B]
) -> Tensor:  # [n, m + 2, B]
    """Each sub-chain's advantage of each part, of the whole reward, and of what first order leaves of it."""
    ends = [sub_chain[-1] for sub_chain in plan.sub_chains]
    rewards = chains.parts_whole_and_left(trajectory.latents[-1], parts)
    rows = 2 * len(chains.x_start)
    return branch_advantages(sampler, theta, trajectory, rewards, chains.parts_whole_and_left, ends, rows=rows)
