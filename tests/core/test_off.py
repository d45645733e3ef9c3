"""Chains whose last step is the base model's: plans, gradients and divergence against autograd and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.gradient import Penalty, estimate_gradient
from rlr_ray.core.half_order import half_order
from rlr_ray.core.kl import compared_steps, divergence_by_step
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Sampler
from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule, steps_off
from rlr_ray.core.zeroth_order import rollout
from rlr_ray.errors import UserError
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains, toy_denoiser, toy_reward, toy_schedule, toy_theta
from tests.toy import worst_z

THETA, ON = toy_theta(), STEPS - 1
BASE = THETA + 0.1 * torch.linspace(-1, 1, PARAMETERS, dtype=torch.float64)
SAMPLER = Sampler(toy_denoiser, toy_schedule(), 1, BASE)


def last_latent(theta: Tensor, chains: Any, steps: Collection[int] = range(ON)) -> Tensor:  # [B, 2, 1, 1]
    """Of chains written out, whose gradient passes through theta [P] or [B, P] at `steps` alone."""
    schedule, latent = SAMPLER.schedule, chains.x_start
    for k in range(STEPS):
        numbers = BASE if k == ON else theta if k in steps else theta.detach()
        output = toy_denoiser(numbers, latent, schedule.timesteps[k], {})
        latent = schedule.mean(k, latent, output) + schedule.sigma[k] * chains.noise[k]
    return latent


def exact(chains: Any, steps: Collection[int]) -> Tensor:  # [B, P]
    theta = THETA.expand(len(chains.x_start), -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(toy_reward(last_latent(theta, chains, steps)).sum(), theta)
    return gradient


def test_samples_are_the_base_models_at_the_last_step_for_any_form_of_theta() -> None:
    chains = toy_chains(8, seed=1)
    expected = last_latent(THETA, chains)
    for theta in (THETA, THETA.expand(8, -1)):
        torch.testing.assert_close(SAMPLER.sample(theta, *chains.start).latents[-1], expected, rtol=1e-12, atol=0)
    assert (Sampler(toy_denoiser, SAMPLER.schedule).sample(THETA, *chains.start).latents[-1] != expected).all()


@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("last", [2, ON])
def test_first_order_passes_through_the_last_step_to_those_before(last: int, checkpoint_steps: bool) -> None:
    chains, shape = toy_chains(64, seed=3), PlanShape(STEPS, STEPS, 0, rest="none").without_last(1)
    plan = replace(shape, first_order_steps=last).draw(0)
    work, groups = {0: (plan, chains)}, torch.zeros(64, dtype=torch.long)
    found = estimate_gradient(SAMPLER, THETA, work, groups, lambda: None, checkpoint_steps=checkpoint_steps)
    expected = exact(chains, range(ON - last, ON)).mean(0)
    torch.testing.assert_close(found.terms["first_order"].gradient, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.rewards, toy_reward(last_latent(THETA, chains)), rtol=1e-12, atol=1e-12)
    assert (plan.forwards(checkpoint_steps), plan.backwards) == (STEPS + checkpoint_steps * (last + 1), last + 1)


def test_russian_roulette_is_unbiased_for_the_steps_that_are_thetas() -> None:
    """Averaged over its depths exactly."""
    chains, groups = toy_chains(16, seed=4), torch.zeros(16, dtype=torch.long)
    shape = PlanShape(STEPS, 2, 0, rest="none", truncation="russian_roulette").without_last(1)
    plans = {len(plan.first_order): plan for plan in (shape.draw(seed) for seed in range(50))}
    assert sorted(plans) == [2, 3, 4, 5]
    terms = [estimate_gradient(SAMPLER, THETA, {0: (p, chains)}, groups, lambda: None).terms for p in plans.values()]
    mean = torch.stack([term["first_order"].gradient for term in terms]).mean(0)
    torch.testing.assert_close(mean, exact(chains, range(ON)).mean(0), rtol=1e-9, atol=1e-12)


def test_half_order_is_unbiased_before_the_last_step_and_is_not_asked_of_it() -> None:
    chains = toy_chains(20_000, seed=5)
    trajectory = SAMPLER.sample(THETA, *chains.start)
    rewards = toy_reward(trajectory.latents[-1])
    advantage = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    theta = THETA.expand(len(rewards), -1).clone()
    found = len(rewards) * half_order(SAMPLER, theta, trajectory, range(2, ON), advantage)
    assert worst_z(found, exact(chains, range(2, ON))) < 3.5
    with pytest.raises(AssertionError, match="step 5 is the base model's"):
        half_order(SAMPLER, THETA, trajectory, range(ON, STEPS), advantage)


def test_rollouts_perturb_no_step_of_the_base_models() -> None:
    """Their differences are the exact directional derivatives of every chain, in the limit of small steps."""
    chains, step = toy_chains(32, seed=6), 1e-4
    plan = PlanShape(STEPS, 0, 0).without_last(1).draw(0)
    assert plan.zeroth_order == tuple(range(ON)) and plan.pair_forwards == 2 * STEPS
    u = torch.randn(32, PARAMETERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plus, minus = rollout(SAMPLER, THETA, plan, chains, u, step)
    expected = (exact(chains, range(ON)) * u).sum(1)
    torch.testing.assert_close((plus - minus) / (2 * step), expected, rtol=1e-4, atol=1e-6)


def test_a_plan_without_first_order_rates_whole_chains() -> None:
    chains, groups = toy_chains(16, seed=7), torch.zeros(16, dtype=torch.long)
    plan = PlanShape(STEPS, 0, 2, rest="half_order").without_last(1).draw(0)
    found = estimate_gradient(SAMPLER, THETA, {0: (plan, chains)}, groups, lambda: None)
    torch.testing.assert_close(found.rewards, toy_reward(last_latent(THETA, chains)), rtol=1e-12, atol=1e-12)


def test_chains_diverge_at_thetas_steps_alone() -> None:
    chains = toy_chains(16, seed=8)
    trajectory = SAMPLER.sample(THETA, *chains.start)
    found = divergence_by_step(SAMPLER, THETA, BASE, trajectory)
    whole = divergence_by_step(Sampler(toy_denoiser, SAMPLER.schedule), THETA, BASE, trajectory)
    assert torch.equal(found[:ON], whole[:ON]) and not found[ON].any() and (whole[ON] > 0).all()
    assert compared_steps(SAMPLER) == list(range(ON))
    silent = replace(SAMPLER, schedule=toy_schedule(eta=0))
    assert divergence_by_step(silent, THETA, BASE, trajectory).isnan().all()


def test_the_penalty_is_measured_at_thetas_steps() -> None:
    chains, groups = toy_chains(16, seed=9), torch.zeros(16, dtype=torch.long)
    plan = PlanShape(STEPS, 1, 0, rest="none").without_last(1).draw(0)
    penalty = Penalty(0.3, BASE, compared_steps(SAMPLER))
    found = estimate_gradient(SAMPLER, THETA, {0: (plan, chains)}, groups, lambda: None, penalty=penalty)
    by_step = divergence_by_step(SAMPLER, THETA, BASE, SAMPLER.sample(THETA, *chains.start))
    assert found.divergence == pytest.approx(float(by_step.sum(0).mean()), abs=1e-6)


def test_base_steps_without_a_base_theta_are_refused() -> None:
    for off, base in ((1, None), (STEPS, BASE), (-1, BASE)):
        with pytest.raises(UserError, match=f"`off` is {off} of 6 steps"):
            Sampler(toy_denoiser, toy_schedule(), off, base)


def test_no_order_owns_a_step_of_the_base_models() -> None:
    places, rests = ("uniform", "importance", "cover"), ("zeroth_order", "half_order", "none")
    for first, length, place, rest in itertools.product(range(11), range(4), places, rests):
        if min(first, 8) + length > 8:
            continue
        shape = PlanShape(10, first, length, place, rest).without_last(2)  # type: ignore[arg-type]
        plan = shape.draw(0, position_weights=[1.0] * 10)
        owned = [*plan.first_order, *(k for chain in plan.sub_chains for k in chain), *plan.zeroth_order]
        assert len(owned) == len(set(owned)) and set(owned) <= set(range(8))
        assert (set(owned) == set(range(8))) != shape.biased
        assert len(plan.first_order) == min(first, 8) and plan.sampled == (plan.first_order or range(10, 10)).start


def test_a_plan_says_that_the_last_step_is_the_base_models_and_what_does_not_fit() -> None:
    whole = str(PlanShape(10, 10, 0).without_last(1))
    assert whole == "10 steps, the last without the adapter: first order on every step"
    assert str(PlanShape(10, 3, 0).without_last(2)).startswith("10 steps, the last 2 without the adapter: first order")
    assert PlanShape(10, 3, 0).without_last(0) == PlanShape(10, 3, 0)
    mixed = PlanShape(10, 3, 2, rest="half_order", mixed=True).without_last(1).draw(0)
    assert max(k for chain in mixed.sub_chains for k in chain) == 8
    assert PlanShape(10, 10, 4, "cover", residual=True).without_last(1).draw(0).sub_chains[-1] == range(5, 9)
    with pytest.raises(UserError, match=r"0 to `steps` \(10\) less the 1 of the base model"):
        PlanShape(10, 10, 0, off=1)
    with pytest.raises(UserError, match=r"does not fit in steps 7 to 8 .*the last 1 are first order or the base model"):
        PlanShape(10, 0, 3, (7, 9)).without_last(1)


def with_kappa(*kappa: float, level: float = 0.9) -> Schedule:
    """Whose last step's input has this signal level, the others' little."""
    count = len(kappa)
    signal = (*[0.1] * (count - 1), math.sqrt(level))
    noise = tuple(math.sqrt(1 - part**2) for part in signal)
    sigma = tuple(1 / one if one < math.inf else 0.0 for one in kappa)
    return Schedule((0.0,) * count, (1.0,) * count, (1.0,) * count, sigma, (), signal, noise)


@pytest.mark.parametrize(
    ("schedule", "off"),
    [
        (with_kappa(1, 1, 3.1), 1),
        (with_kappa(1, 1, 2.9), 0),  # 9 times the divergence of the step before's
        (with_kappa(5, 1, math.inf), 1),
        (with_kappa(1, 1, 3.1, level=0.83), 0),  # a step of large change
        (with_kappa(1, 1, math.inf, level=0.5), 0),
        (with_kappa(3.1), 0),
        (with_kappa(math.inf, math.inf, math.inf), 0),  # eta 0
        (replace(with_kappa(1, 1, 3.1), signal=(), noise=()), 0),
    ],
)
def test_steps_are_off_by_how_their_divergence_jumps(schedule: Schedule, off: int) -> None:
    assert steps_off(schedule, 1 / 3) == off
    assert steps_off(schedule, 0.0) == 0


def test_ancestral_steps_go_by_their_ratio_of_signal_to_noise() -> None:
    """kappa^2 is the ratio of SNR less 1; so steps that double it and a last one times 10 +- .1 lie at the bound."""
    for last, off in ((9.9, 0), (10.1, 1)):
        ratios = [0.5 * 2**k for k in range(6)]  # SNR: alpha-bar / (1 - alpha-bar)
        alphas = [ratio / (1 + ratio) for ratio in (*ratios, last * ratios[-1])]
        schedule = ddim_schedule(range(6), alphas[:-1], alphas[1:], eta=1.0)
        assert schedule.kappa == pytest.approx([1.0] * 5 + [math.sqrt(last - 1)])
        assert steps_off(schedule, 1 / 3) == off


@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_a_flow_has_no_such_step(steps: int, eta: float) -> None:
    """Of equal steps the last kappa is sqrt(2 (T - 1) / (T - 2)) times the one before, whatever eta."""
    schedule = flow_schedule(range(steps), [1 - k / steps for k in range(steps + 1)], noise_level=eta)
    ratio = math.sqrt(2 * (steps - 1) / (steps - 2))
    assert schedule.kappa[-1] / schedule.kappa[-2] == pytest.approx(ratio)
    assert [steps_off(schedule, below) > 0 for below in (1 / 3, 0.99 / ratio, 1.01 / ratio)] == [False, False, True]


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("steps", "off"), [(1, 0), (2, 0), (4, 0), (5, 0), (10, 1), (20, 1), (50, 1)])
def test_stable_diffusions_last_step_is_off_but_of_few_steps(steps: int, off: int, eta: float) -> None:
    assert steps_off(toy_schedule(steps, eta), 1 / 3) == (off if eta else 0)
