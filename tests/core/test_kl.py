"""The divergence from the base model against torch.distributions, and its gradient against autograd."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from rlr_ray.core.gradient import Penalty, estimate_gradient
from rlr_ray.core.kl import divergence_by_step, divergence_gradient
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler, Trajectory
from rlr_ray.core.schedule import Schedule
from rlr_ray.lab.toy import STEPS, toy_chains, toy_denoiser, toy_reward, toy_sampler, toy_theta
from tests.toy import toy_trajectory

SAMPLER, CHAINS = toy_sampler(), toy_chains(16, seed=3)
TRAJECTORY, THETA = toy_trajectory(CHAINS), toy_theta()
BASE = THETA + 0.05 * torch.linspace(-1, 1, len(THETA), dtype=THETA.dtype)


def by_torch(theta: torch.Tensor, schedule: Schedule, trajectory: Trajectory) -> torch.Tensor:  # [B]
    sampler, total = Sampler(toy_denoiser, schedule), torch.zeros(16, dtype=theta.dtype)
    for k, sigma in enumerate(schedule.sigma):
        arguments = (k, trajectory.latents[k], {})
        means = [sampler.mean(numbers, *arguments) for numbers in (theta, BASE)]
        total = total + kl_divergence(*(Normal(mean, sigma) for mean in means)).flatten(1).sum(1)
    return total


def test_it_is_that_of_torch() -> None:
    found = divergence_by_step(SAMPLER, THETA, BASE, TRAJECTORY).sum(0)
    torch.testing.assert_close(found, by_torch(THETA, SAMPLER.schedule, TRAJECTORY), rtol=1e-10, atol=1e-12)
    assert float(found.min()) > 0
    assert not divergence_by_step(SAMPLER, BASE, BASE, TRAJECTORY).any()


def test_its_gradient_is_autograds_with_the_states_held() -> None:
    theta = THETA.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_torch(theta, SAMPLER.schedule, TRAJECTORY).mean(), theta)
    found, nats = divergence_gradient(SAMPLER, THETA, BASE, TRAJECTORY, range(STEPS))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(nats, by_torch(THETA, SAMPLER.schedule, TRAJECTORY), rtol=1e-10, atol=1e-12)


def test_a_few_steps_stand_for_all() -> None:
    """The mean over every choice of 2 steps is the whole, exactly."""
    whole, nats = divergence_gradient(SAMPLER, THETA, BASE, TRAJECTORY, range(STEPS))
    pairs = [(a, b) for a in range(STEPS) for b in range(a)]
    found = [divergence_gradient(SAMPLER, THETA, BASE, TRAJECTORY, pair) for pair in pairs]
    torch.testing.assert_close(torch.stack([g for g, _ in found]).mean(0), whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack([n for _, n in found]).mean(0), nats, rtol=1e-9, atol=1e-12)


def test_an_update_pays_for_it() -> None:
    """A term of its own, downhill, the same from two chunks as from the whole batch."""
    parts = [slice(0, 8), slice(8, 16)]
    chunks = [Chains(CHAINS.x_start[part], CHAINS.noise[:, part], {}, toy_reward) for part in parts]
    plan = Plan(STEPS, range(STEPS - 1, STEPS), (), ())
    arguments = (SAMPLER, THETA, {c: (plan, chunk) for c, chunk in enumerate(chunks)})
    groups, penalty = torch.arange(16) // 4, Penalty(0.3, BASE, range(STEPS))
    found = estimate_gradient(*arguments, groups, lambda: None, penalty=penalty)
    whole, nats = divergence_gradient(SAMPLER, THETA, BASE, TRAJECTORY, range(STEPS))
    torch.testing.assert_close(found.terms["kl_penalty"].gradient, -0.3 * whole, rtol=1e-9, atol=1e-12)
    assert found.divergence is not None and abs(found.divergence - float(nats.mean())) < 1e-6
