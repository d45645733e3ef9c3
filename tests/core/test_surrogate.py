"""First order on a surrogate c Q and the other orders on R - c Q: unbiased for R on the toy chain, whatever Q is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlr_ray.core.first_order import first_order
from rlr_ray.core.gradient import estimate_gradient
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.core.plan import Plan
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains, Objective
from rlr_ray.core.weighting import correlation_and_slope, moments
from rlr_ray.core.zeroth_order import Directions, rollout
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains, toy_reward, toy_sampler, toy_theta
from tests.toy import exact_gradient, per_chain_theta, toy_trajectory, worst_z

SAMPLER = toy_sampler()
COUNT = 100_000
SHARE = 0.7  # c
PLAN = PlanShape(STEPS, STEPS, 2, "cover", residual=True).draw(0)


def imperfect(latent: Tensor) -> Tensor:  # [B]
    """A Q that knows some of the toy reward, and is wrong about the rest."""
    x, y = latent.flatten(1).unbind(1)
    return torch.sin(1.5 * x) + 0.2 * x * y + 0.6 * y


def surrogate_chains(count: int, seed: int) -> Chains:
    return replace(toy_chains(count, seed), surrogate=imperfect)


def first_order_estimates(chains: Chains, objective: Objective) -> Tensor:  # [B, P]
    theta, start = per_chain_theta(chains), toy_trajectory(chains, 0)
    return len(theta) * first_order(SAMPLER, theta, start, objective)[0]


def half_order_estimates(chains: Chains, carried: Objective, plan: Plan = PLAN) -> Tensor:  # [B, P]
    theta, trajectory = per_chain_theta(chains), toy_trajectory(chains)
    values = carried(trajectory.latents[-1])
    advantage = (values - values.mean()) * len(values) / (len(values) - 1)  # leave-one-out, in closed form
    terms = (half_order(SAMPLER, theta, trajectory, block, advantage) for block in plan.sub_chains)
    return len(theta) * sum(terms)


def test_surrogate_and_residual_are_unbiased_and_vary_less_than_reinforce() -> None:
    chains = surrogate_chains(COUNT, seed=21).with_control_variate(SHARE)
    exact = exact_gradient(chains, range(STEPS))
    assert chains.surrogate is not None
    carried = first_order_estimates(chains, chains.surrogate)
    both = carried + half_order_estimates(chains, chains.residual)
    assert worst_z(both, exact) < 3.5
    assert worst_z(carried, exact) > 5  # the surrogate alone is biased
    assert worst_z(carried + half_order_estimates(chains, chains.objective), exact) > 5  # counted twice
    plain = half_order_estimates(chains, chains.objective)
    assert both.var(0).sum() < 0.7 * plain.var(0).sum()


def test_zeroth_order_carries_the_residual() -> None:
    """Rollouts rate both signs by R - c Q, at scale 0.003, on every step."""
    chains, directions = surrogate_chains(COUNT, seed=22).with_control_variate(SHARE), Directions(PARAMETERS, 0.003)
    assert chains.surrogate is not None
    u = torch.randn(COUNT, PARAMETERS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plan = PlanShape(STEPS, STEPS, 0, residual=True).draw(0)
    plus, minus = rollout(SAMPLER, toy_theta(), plan, chains, u, directions.step_size)
    rest = ((plus - minus) / (2 * directions.step_size))[:, None] * u
    assert worst_z(first_order_estimates(chains, chains.surrogate) + rest, exact_gradient(chains, range(STEPS))) < 3.5


def test_the_sum_is_first_order_of_the_surrogate_and_half_order_of_the_residual() -> None:
    """`estimate_gradient` on two chunks against the terms called one by one on the whole batch."""
    whole = surrogate_chains(16, seed=23).with_control_variate(SHARE)
    parts = [slice(0, 8), slice(8, 16)]
    chunks = [replace(whole, x_start=whole.x_start[part], noise=whole.noise[:, part]) for part in parts]
    groups = torch.arange(16) // 4
    found = estimate_gradient(
        SAMPLER, toy_theta(), {c: (PLAN, chunk) for c, chunk in enumerate(chunks)}, groups, lambda: None
    )
    trajectory = toy_trajectory(whole)
    last = trajectory.latents[-1]
    assert whole.surrogate is not None
    first, _, _ = first_order(SAMPLER, toy_theta(), toy_trajectory(whole, 0), whole.surrogate)
    advantage = leave_one_out(toy_reward(last) - SHARE * imperfect(last), groups)
    blocks = (half_order(SAMPLER, toy_theta(), trajectory, b, advantage) for b in PLAN.sub_chains)
    torch.testing.assert_close(found.total({}), first + sum(blocks), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.rewards, toy_reward(last))
    torch.testing.assert_close(torch.cat([found.latents[0], found.latents[1]]), last)


def test_a_surrogate_that_is_not_trusted_leaves_everything_to_the_other_orders() -> None:
    shape = PlanShape(10, 10, 3, (2, 6), residual=True)
    trusted, untrusted = shape.draw(0), shape.without_surrogate().draw(0)
    assert not untrusted.first_order and not untrusted.residual
    assert (untrusted.sub_chains, untrusted.zeroth_order) == (trusted.sub_chains, trusted.zeroth_order)
    roulette = PlanShape(10, 1, 0, rest="half_order", truncation="russian_roulette", residual=True)
    assert [len(block) for block in roulette.without_surrogate().draw(0).sub_chains] == [1] * 10
    plain = PlanShape(10, 3, 3)
    assert plain.without_surrogate() is plain
    assert surrogate_chains(4, seed=1).with_control_variate(0.0).surrogate is None


def group_estimates(share: str) -> float:
    """Worst z over 25,000 updates of 4 chains each, whose c is what `share` says."""
    chains, groups = surrogate_chains(COUNT, seed=24), torch.arange(COUNT) // 4
    theta, trajectory = per_chain_theta(chains), toy_trajectory(chains)
    last = trajectory.latents[-1]
    terms = []
    for values in (toy_reward(last), imperfect(last)):
        fours = values.view(-1, 4)
        advantage = ((fours - fours.mean(1, keepdim=True)) * 4 / 3).flatten()
        blocks = [half_order(SAMPLER, theta, trajectory, b, advantage) for b in PLAN.sub_chains]
        terms.append(COUNT * sum(blocks))
    q, r = (x.view(-1, 4) - x.view(-1, 4).mean(1, keepdim=True) for x in (imperfect(last), toy_reward(last)))
    slope = (q * r).sum(1) / (q * q).sum(1)  # of each update's own chains
    c = {"own": slope, "earlier": slope.roll(1)}[share].clamp(-3, 3)[groups, None]
    estimates = terms[0] + c * (first_order_estimates(chains, imperfect) - terms[1])
    updates = (x.view(-1, 4, PARAMETERS).mean(1) for x in (estimates, exact_gradient(chains, range(STEPS))))
    return worst_z(*updates)


def test_a_coefficient_of_earlier_chains_keeps_the_sum_unbiased_and_one_of_the_same_chains_does_not() -> None:
    assert group_estimates("earlier") < 3.5
    assert group_estimates("own") > 5


def test_moments_are_of_what_the_baseline_leaves() -> None:
    """Against torch.corrcoef and a least-squares fit, on values less their group's mean."""
    source = torch.Generator().manual_seed(3)
    q = torch.randn(2, 12, generator=source, dtype=torch.float64)
    r = 0.5 * q + torch.randn(2, 12, generator=source, dtype=torch.float64)
    groups = torch.arange(12) // 3
    offset = 100.0 * groups  # what prompts differ in must not count
    found = correlation_and_slope([moments(a + offset, b - offset, groups) for a, b in zip(q, r, strict=True)])
    within = [(x.view(2, 4, 3) - x.view(2, 4, 3).mean(2, keepdim=True)).flatten() for x in (q, r)]
    slope = torch.linalg.lstsq(within[0][:, None], within[1][:, None]).solution.item()
    assert found == pytest.approx((torch.corrcoef(torch.stack(within))[0, 1].item(), slope), rel=1e-9)
    assert correlation_and_slope([]) == (0.0, 0.0)
    assert correlation_and_slope([moments(torch.ones(4), torch.randn(4), torch.zeros(4))]) == (0.0, 0.0)
