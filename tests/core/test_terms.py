"""Every term alone against its own part of the exact gradient, and the errors that such a test must catch.

Unbiasedness is a z-score: the mean difference from the exact gradient on the same chains over its standard error, the
largest over the gradient's direction and 20 random ones. A right term stays below 3.5; each deliberate error exceeds 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlr_ray.core.half_order as half_order_module
from rlr_ray.core.first_order import first_order, step_gradients
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.core.kl import compared_steps
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler, Trajectory
from rlr_ray.core.weighting import Cut
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, principal_span, rollout, zeroth_order
from rlr_ray.errors import UserError
from rlr_ray.lab.toy import PARAMETERS, SCHEDULER, STEPS, toy_chains, toy_denoiser, toy_reward, toy_sampler, toy_theta
from rlr_ray.models.schedulers import schedule_of
from tests.toy import exact_gradient, per_chain_theta, toy_trajectory, worst_z

SUB_CHAINS = [range(2, 3), range(1, 3), range(2, 5), range(0, 5)]
SAMPLER = toy_sampler()
COUNT = 50_000


def half_order_estimates(chains: Chains, sub_chain: range, advantage: Tensor) -> Tensor:  # [B, P]
    theta = per_chain_theta(chains)
    return len(theta) * half_order(SAMPLER, theta, toy_trajectory(chains), sub_chain, advantage)


def one_group_advantage(chains: Chains) -> Tensor:  # [B]
    return among_all(toy_reward(toy_trajectory(chains).latents[-1]))


def among_all(rewards: Tensor) -> Tensor:  # [B]
    count = len(rewards)
    return (rewards - rewards.mean()) * count / (count - 1)  # leave-one-out over one group, in closed form


def zeroth_order_estimates(chains: Chains, plan: Plan, directions: Directions, seed: int) -> Tensor:  # [B, P]
    """One direction a chain, all drawn at once (as many seeds would be slow)."""
    source = torch.Generator().manual_seed(seed)
    size = (len(chains.x_start), directions.dimensions)
    u = directions.lift(torch.randn(size, generator=source, dtype=torch.float64))
    plus, minus = rollout(SAMPLER, toy_theta(), plan, chains, u, directions.step_size)
    return ((plus - minus) / (2 * directions.step_size))[:, None] * u


def plan_of(zeroth: tuple[int, ...]) -> Plan:
    return Plan(STEPS, range(STEPS, STEPS), (), zeroth)


@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("last", [1, 3, STEPS])
def test_first_order_is_autograd(last: int, checkpoint_steps: bool) -> None:
    """Against autograd through the whole chain, the copies of theta at earlier steps held fixed."""
    chains = toy_chains(64, seed=3)
    gradient, rewards, whole = first_order(
        SAMPLER,
        toy_theta(),
        toy_trajectory(chains, STEPS - last),
        toy_reward,
        checkpoint_steps=checkpoint_steps,
    )
    exact = exact_gradient(chains, range(STEPS - last, STEPS)).mean(0)
    torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rewards, toy_reward(toy_trajectory(chains).latents[-1]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.latents, toy_trajectory(chains).latents, rtol=1e-12, atol=1e-14)


def test_step_gradients_are_first_order_taken_apart() -> None:
    chains = toy_chains(64, seed=3)
    arguments = (SAMPLER, toy_theta(), toy_trajectory(chains, 2), toy_reward)
    apart, _ = step_gradients(*arguments)
    for k, gradient in zip(range(2, STEPS), apart, strict=True):
        torch.testing.assert_close(gradient, exact_gradient(chains, [k]).mean(0), rtol=1e-12, atol=1e-14)
    weights = [4.0, 0.5, 2.0, 1.0]
    weighted, _, _ = first_order(*arguments, step_weights=weights)
    torch.testing.assert_close(weighted, torch.tensor(weights).double() @ apart, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sub_chain", SUB_CHAINS, ids=str)
def test_half_order_is_unbiased(sub_chain: range) -> None:
    """50,000 chains; standard error of the mean along the gradient 2-6 % of its norm."""
    chains = toy_chains(COUNT, seed=5)
    estimates = half_order_estimates(chains, sub_chain, one_group_advantage(chains))
    assert worst_z(estimates, exact_gradient(chains, sub_chain)) < 3.5


@pytest.mark.parametrize("sub_chain", [range(2, 3), range(0, 4)], ids=str)
def test_half_order_is_unbiased_where_few_steps_have_noise(sub_chain: range) -> None:
    """Noise at steps 2 and 3 alone, where sub-chains end: those before may be without."""
    sampler = Sampler(toy_denoiser, schedule_of(SCHEDULER, STEPS, [0.0, 0.0, 1.0, 0.6, 0.0, 0.0]))
    chains = toy_chains(COUNT, seed=5)
    theta, trajectory = per_chain_theta(chains), sampler.sample(toy_theta(), *chains.start)
    advantage = among_all(toy_reward(trajectory.latents[-1]))
    estimates = COUNT * half_order(sampler, theta, trajectory, sub_chain, advantage)
    assert worst_z(estimates, exact_gradient(chains, sub_chain, sampler)) < 3.5
    assert compared_steps(sampler) == [2, 3]
    with pytest.raises(UserError, match="half order ends at step 4, where the sampler adds no noise"):
        half_order(sampler, theta, trajectory, range(4, 5), advantage)


def test_half_order_of_one_step_is_reinforce() -> None:
    """Against the gradient of a log-density from torch.distributions."""
    chains, k = toy_chains(32, seed=6), 2
    trajectory, advantage = toy_trajectory(chains), one_group_advantage(chains)
    theta = toy_theta().requires_grad_()
    mean = SAMPLER.mean(theta, k, trajectory.latents[k], {})
    density = (
        torch.distributions.Normal(mean, SAMPLER.schedule.sigma[k])
        .log_prob(trajectory.latents[k + 1])
        .flatten(1)
        .sum(1)
    )
    (expected,) = torch.autograd.grad((advantage * density).mean(), theta)
    found = half_order(SAMPLER, toy_theta(), trajectory, range(k, k + 1), advantage)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_half_order_refuses_a_step_without_noise() -> None:
    chains = toy_chains(4, seed=3)
    with pytest.raises(ValueError, match=r"ends at step 2, where the sampler adds no noise.*eta above 0"):
        half_order(toy_sampler(eta=0), toy_theta(), toy_trajectory(chains), range(1, 3), torch.ones(4).double())


@pytest.mark.parametrize("zeroth", [(0, 1, 2, 3, 4, 5), (0, 4), (1, 2, 3)], ids=str)
def test_zeroth_order_is_unbiased(zeroth: tuple[int, ...]) -> None:
    """Isotropic, scale 0.003: its smoothing error is below 0.2 %, less than the standard error."""
    chains = toy_chains(COUNT, seed=7)
    estimates = zeroth_order_estimates(chains, plan_of(zeroth), Directions(PARAMETERS, 0.003), seed=8)
    assert worst_z(estimates, exact_gradient(chains, zeroth)) < 3.5


def test_zeroth_order_coefficient_is_the_directional_derivative() -> None:
    """Slope and correlation above 0.999 against the exact u . g_C of the same chains, at scale 0.003."""
    chains, zeroth, directions = toy_chains(20_000, seed=9), (0, 1, 4), Directions(PARAMETERS, 0.003)
    u = torch.randn(20_000, PARAMETERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plus, minus = rollout(SAMPLER, toy_theta(), plan_of(zeroth), chains, u, directions.step_size)
    found, exact = (plus - minus) / (2 * directions.step_size), (u * exact_gradient(chains, zeroth)).sum(1)
    slope = float((found * exact).sum() / exact.square().sum())
    correlation = float(torch.corrcoef(torch.stack([found, exact]))[0, 1])
    assert abs(slope - 1) < 1e-3
    assert correlation > 0.999


def test_guided_zeroth_order_estimates_the_projection() -> None:
    """On a span of 3 vectors drawn apart: unbiased for the projection, and more than 3 times less noise."""
    chains, zeroth = toy_chains(COUNT, seed=10), (0, 1, 2, 4)
    vectors = torch.randn(3, PARAMETERS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = orthonormal_span(list(vectors))
    assert basis is not None
    exact = exact_gradient(chains, zeroth)
    guided = zeroth_order_estimates(chains, plan_of(zeroth), Directions(PARAMETERS, 0.003, basis), seed=11)
    isotropic = zeroth_order_estimates(chains, plan_of(zeroth), Directions(PARAMETERS, 0.003), seed=11)
    assert worst_z(guided, exact @ basis.T @ basis) < 3.5
    assert guided.var(0).sum() * 3 < isotropic.var(0).sum()


def test_a_span_of_one_direction_measures_the_slope_along_it() -> None:
    """Of a linear reward exactly, whatever the draws' signs; on the toy chain to 1 % of the same chains' exact one."""
    g, rows = torch.randn(2, PARAMETERS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis = principal_span([rows, 2 * rows], 1)
    assert basis is not None and len(basis) == 1
    directions, seeds = Directions(PARAMETERS, 0.003, basis), [("one", i) for i in range(400)]
    u = torch.stack([directions.draw(seed, torch.float64) for seed in seeds])
    slopes = directions.step_size * (u @ g)
    linear = zeroth_order(directions, seeds, slopes, -slopes, torch.float64)
    torch.testing.assert_close(linear.gradient, (basis[0] @ g) * basis[0], rtol=1e-9, atol=1e-12)
    assert abs(linear.variance) < 1e-12
    chains = toy_chains(400, seed=10)
    pairs = rollout(SAMPLER, toy_theta(), plan_of((0, 1, 2)), chains, u, directions.step_size)
    term = zeroth_order(directions, seeds, *pairs, torch.float64)
    truth = float(exact_gradient(chains, (0, 1, 2)).mean(0) @ basis[0])
    assert float(term.gradient @ basis[0]) == pytest.approx(truth, rel=0.01)


def test_clipped_differences_are_cut_at_their_median_size() -> None:
    """As if the pairs' rewards had differed by no more. Pairs that are equal set no median."""
    directions, seeds = Directions(4, 0.01), [("clip", i) for i in range(6)]
    plus, minus = torch.tensor([3.0, 1.0, 0.0, 0.0, -20.0, 50.0]), torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    found = zeroth_order(directions, seeds, plus, minus, torch.float64, clip=1.5)
    cut = torch.tensor([3.0, -1.0, 0.0, 0.0, -4.5, 4.5])  # of the sizes 1, 3, 20, 50 torch takes 3
    expected = zeroth_order(directions, seeds, cut, torch.zeros(6), torch.float64)
    torch.testing.assert_close(found.gradient, expected.gradient)
    assert found.variance == pytest.approx(expected.variance)
    assert found.cut == Cut(2 / 6, pytest.approx(1 - 13 / 74)) and expected.cut is None
    equal = zeroth_order(directions, seeds, plus, plus, torch.float64, clip=1.0)
    assert not equal.gradient.any() and equal.cut == Cut(0.0, 0.0)


def test_principal_span_holds_more_of_the_rows_than_any_other() -> None:
    """Against the eigenvalues of the rows' second moment; the rows have rank 3."""
    source = torch.Generator().manual_seed(4)
    rows = torch.randn(20, 3, generator=source) @ torch.randn(3, 9, generator=source)
    largest = torch.linalg.eigvalsh(rows.T @ rows).flip(0)
    for count in (1, 2):
        basis = principal_span(rows, count)
        assert basis is not None
        torch.testing.assert_close(basis @ basis.T, torch.eye(count))
        torch.testing.assert_close((rows @ basis.T).square().sum(), largest[:count].sum())
    numpys = torch.linalg.svd(rows.double(), full_matrices=False)[2][:2].float()
    torch.testing.assert_close(basis.T @ basis, numpys.T @ numpys, atol=1e-6, rtol=0)  # the same span
    rest = principal_span(rows, 8)
    assert rest is not None and len(rest) == 3
    assert principal_span(torch.zeros(4, 9), 2) is None


def test_a_principal_span_of_many_numbers_and_small_values_is_orthonormal() -> None:
    """More than one block; singular values down to 1/500 of the largest; orthonormal and the SVD's span to 1e-6."""
    source = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, 6, generator=source))[0] for n in (12, 40_000))
    rows = left @ torch.logspace(0, -2.7, 6).diag() @ right.T
    basis = principal_span(list(rows), 6)
    assert basis is not None and basis.dtype == torch.float32
    torch.testing.assert_close(basis @ basis.T, torch.eye(6), atol=2e-6, rtol=0)
    theirs = torch.linalg.svd(rows.double(), full_matrices=False)[2][:6]
    cosines = torch.linalg.svdvals(basis.double() @ theirs.T)  # of the principal angles
    torch.testing.assert_close(cosines, torch.ones(6).double(), atol=1e-6, rtol=0)


def test_directions_have_one_length_which_costs_less_variance_than_normal_numbers() -> None:
    """In k = 3 dimensions: E u u^T = I, and a variance of k |g|^2 - |g|^2 instead of (k + 2) |g|^2 - |g|^2."""
    directions, g = Directions(3, 0.01), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    u = torch.stack([directions.draw(("draw", i), torch.float64) for i in range(20_000)])
    torch.testing.assert_close(u.norm(dim=1), torch.full((20_000,), math.sqrt(3), dtype=torch.float64))
    torch.testing.assert_close(u.T @ u / 20_000, torch.eye(3, dtype=torch.float64), atol=0.03, rtol=0)
    estimates = (u @ g)[:, None] * u
    assert abs(float(estimates.var(0).sum() / g.square().sum()) - 2) < 0.03


def test_the_sum_is_unbiased() -> None:
    """The paper's shape (K = 1, a sub-chain of 2, zeroth order on the rest) for the whole gradient."""
    chains, sub_chain, zeroth = toy_chains(COUNT, seed=12), range(2, 4), (0, 1, 4)
    theta = per_chain_theta(chains)
    first, _, _ = first_order(SAMPLER, theta, toy_trajectory(chains, STEPS - 1), toy_reward)
    half = half_order_estimates(chains, sub_chain, one_group_advantage(chains))
    rest = zeroth_order_estimates(chains, plan_of(zeroth), Directions(PARAMETERS, 0.003), seed=13)
    assert worst_z(COUNT * first + half + rest, exact_gradient(chains, range(STEPS))) < 3.5


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    """Against a plain loop, with groups of unequal size."""
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 2])
    for i, advantage in enumerate(leave_one_out(rewards, groups)):
        others = [rewards[j] for j in range(9) if j != i and groups[j] == groups[i]]
        torch.testing.assert_close(advantage, rewards[i] - sum(others) / len(others))
    with pytest.raises(ValueError, match="at least 2 chains in every group"):
        leave_one_out(rewards, torch.arange(9))


# Deliberate errors: each must be seen by the check that the right term passes.


def own_reward_in_baseline() -> float:
    """A mean over groups of 4 that includes the chain itself: too small by 1/4."""
    chains, sub_chain = toy_chains(COUNT, seed=5), range(1, 3)
    rewards = toy_reward(toy_trajectory(chains).latents[-1])
    advantage = rewards - rewards.view(-1, 4).mean(1).repeat_interleave(4)
    return worst_z(half_order_estimates(chains, sub_chain, advantage), exact_gradient(chains, sub_chain))


def divided_by_standard_deviation() -> float:
    chains, sub_chain = toy_chains(COUNT, seed=5), range(1, 3)
    advantage = one_group_advantage(chains)
    estimates = half_order_estimates(chains, sub_chain, advantage / advantage.std())
    return worst_z(estimates, exact_gradient(chains, sub_chain))


def zeroth_order_perturbs_the_sub_chain() -> float:
    chains, zeroth = toy_chains(COUNT, seed=7), (0, 4)
    every = plan_of(tuple(range(STEPS)))
    estimates = zeroth_order_estimates(chains, every, Directions(PARAMETERS, 0.003), seed=8)
    return worst_z(estimates, exact_gradient(chains, zeroth))


def wrong_half_order(noise_of: Callable[[Tensor], Tensor], sub_chain: range, factor: float = 1.0) -> float:
    """Half order on a trajectory whose noises were replaced after sampling."""
    chains = toy_chains(COUNT, seed=5)
    right = toy_trajectory(chains)
    wrong = type(right)(right.latents, noise_of(right.noise), right.conditioning)
    theta = per_chain_theta(chains)
    estimates = half_order(SAMPLER, theta, wrong, sub_chain, one_group_advantage(chains))
    return worst_z(factor * COUNT * estimates, exact_gradient(chains, SUB_CHAINS[2]))


def inner_noises_resampled() -> float:
    source = torch.Generator().manual_seed(77)

    def resample(noise: Tensor) -> Tensor:
        inner = torch.randn(2, *noise.shape[1:], generator=source, dtype=noise.dtype)
        return torch.cat([noise[:2], inner, noise[4:]])

    return wrong_half_order(resample, SUB_CHAINS[2])


ERRORS = {
    "own reward in the baseline": own_reward_in_baseline,
    "divided by the standard deviation": divided_by_standard_deviation,
    "zeroth order perturbs the sub-chain": zeroth_order_perturbs_the_sub_chain,
    "inner noises resampled": inner_noises_resampled,
    "noise index off by one": lambda: wrong_half_order(lambda noise: noise.roll(-1, 0), SUB_CHAINS[2]),
    "missing 1 / sigma": lambda: wrong_half_order(lambda noise: noise, SUB_CHAINS[2], SAMPLER.schedule.sigma[4]),
    "last step dropped": lambda: wrong_half_order(lambda noise: noise, SUB_CHAINS[2][:-1]),
}


@pytest.mark.parametrize("error", ERRORS)
def test_deliberate_errors_are_seen(error: str) -> None:
    z = ERRORS[error]()
    assert z > 5, f"a term with this error passes: worst z {z:.2f}"
    assert math.isfinite(z)


def test_half_order_behind_is_exact_for_its_step_but_for_the_cut_and_wrong_without_ratios(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At step 0, whose input is no theta's: the derivative at theta's step 0, where the later ones are the other's."""
    chains, theta = toy_chains(60_000, seed=5), toy_theta()
    other = theta + 0.15 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
    trajectory = SAMPLER.sample(other, *chains.start)
    reward = toy_reward(trajectory.latents[-1])
    leaf = theta.clone().requires_grad_()
    latent = SAMPLER.step(leaf, 0, chains.x_start, chains.noise[0], {})
    for k in range(1, STEPS):
        latent = SAMPLER.step(other, k, latent, chains.noise[k], {})
    (exact,) = torch.autograd.grad(toy_reward(latent).mean(), leaf)

    def part(first: int, behind: bool) -> Tensor:  # [P]
        rows = slice(first, first + 1000)
        some = Trajectory(trajectory.latents[:, rows], chains.noise[:, rows], {})
        return half_order(SAMPLER, theta, some, range(1), reward[rows] - reward.mean(), behind=behind)

    cut = part(0, True)
    monkeypatch.setattr(half_order_module, "_MOST_RATIO", math.inf)
    for behind in (True, False):
        each = torch.stack([part(first, behind) for first in range(0, 60_000, 1000)]) - exact
        z = each.mean(0) / (each.std(0) / len(each) ** 0.5)
        assert float(z.abs().max()) < 3.5 if behind else float(z.abs().max()) > 7
    assert not torch.allclose(cut, part(0, True))
    ours = half_order(SAMPLER, other, trajectory, range(2), reward, behind=True)
    torch.testing.assert_close(ours, half_order(SAMPLER, other, trajectory, range(2), reward), rtol=1e-6, atol=1e-9)
