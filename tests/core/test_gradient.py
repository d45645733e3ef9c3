"""The sum of the terms, its statistics, and that neither depends on who computed which chunk."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.chunk import begin
from rlr_ray.core.first_order import first_order
from rlr_ray.core.gradient import GradientEstimate, Penalty, estimate_gradient
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Conditioning, Sampler
from rlr_ray.core.sums import LIMIT, ExactMean, Reduce
from rlr_ray.core.weighting import Cut, TermEstimate, mse_weight, term_estimate
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, rollout, zeroth_order
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains, toy_denoiser, toy_reward, toy_sampler, toy_theta
from tests.runs import shared
from tests.toy import exact_gradient, toy_trajectory

PLAN = Plan(STEPS, range(5, 6), (range(2, 4),), (0, 1, 4))
SAMPLER, SIZE = toy_sampler(), 8
DIRECTIONS = Directions(PARAMETERS, 0.003)


def chunk(chains: Chains, c: int) -> Chains:
    part = slice(c * SIZE, (c + 1) * SIZE)
    return Chains(chains.x_start[part], chains.noise[:, part], {}, toy_reward)


def zeroth_term(chains: Chains, indices: list[int]) -> TermEstimate:
    """One chain a direction, rollouts in any order, summed by seed."""
    seeds = {i: (0, "direction", i) for i in range(len(chains.x_start))}
    plus, minus = torch.zeros(2, len(seeds), dtype=torch.float64)
    for i in indices:
        one = Chains(chains.x_start[i : i + 1], chains.noise[:, i : i + 1], {}, toy_reward)
        u = DIRECTIONS.draw(seeds[i], torch.float64)[None]
        a, b = rollout(SAMPLER, toy_theta(), PLAN, one, u, DIRECTIONS.step_size)
        plus[i], minus[i] = a.item(), b.item()
    return zeroth_order(DIRECTIONS, list(seeds.values()), plus, minus, torch.float64, clip=1.0)


def estimate(
    chains: Chains, own: list[int], leads: bool = True, together: int = 1, backwards: bool = False, **options: Any
) -> GradientEstimate:
    """`backwards`: chains come in the opposite order of the chunks, as from elsewhere."""
    count, kept = len(chains.x_start), options["penalty"].steps if "penalty" in options else ()
    order, work = list(reversed(range(count))), {c: (PLAN, chunk(chains, c)) for c in own}
    begun = list(begin(SAMPLER, toy_theta(), work, together, kept))
    return estimate_gradient(
        SAMPLER,
        toy_theta(),
        work,
        torch.arange(count) // 4,
        lambda: zeroth_term(chains, order) if leads else None,
        begun=begun[::-1] if backwards else begun,
        **options,
    )


def test_the_sum_is_its_terms() -> None:
    """Against the terms called one by one on the whole batch."""
    chains = toy_chains(32, seed=1)
    found = estimate(chains, [0, 1, 2, 3])
    trajectory = toy_trajectory(chains)
    first, rewards, _ = first_order(SAMPLER, toy_theta(), toy_trajectory(chains, 5), toy_reward)
    advantage = leave_one_out(rewards, torch.arange(32) // 4)
    half = half_order(SAMPLER, toy_theta(), trajectory, range(2, 4), advantage)
    zeroth = zeroth_term(chains, list(range(32)))
    torch.testing.assert_close(found.total({}), first + half + zeroth.gradient, rtol=1e-10, atol=1e-12)
    assert found.terms["zeroth_order"].cut == zeroth.cut != Cut(0.0, 0.0)
    weighted = found.total({"half_order": 0.5, "zeroth_order": 0.0})
    torch.testing.assert_close(weighted, first + 0.5 * half, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.rewards, rewards)


def test_full_backpropagation_is_the_exact_gradient() -> None:
    chains = toy_chains(16, seed=2)
    plan = Plan(STEPS, range(STEPS), (), ())
    work = {c: (plan, chunk(chains, c)) for c in range(2)}
    found = estimate_gradient(SAMPLER, toy_theta(), work, torch.zeros(16), lambda: None, checkpoint_steps=True)
    torch.testing.assert_close(found.total({}), exact_gradient(chains, range(STEPS)).mean(0), rtol=1e-11, atol=1e-13)


def test_chunks_sampled_together_are_the_same_chains() -> None:
    chains, batches = toy_chains(32, seed=3), []

    def counted(theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        batches.append(len(latent))
        return toy_denoiser(theta, latent, timestep, conditioning)

    def run(together: int, starts: list[int]) -> GradientEstimate:
        batches.clear()
        plans = [Plan(STEPS, range(start, STEPS), (range(0, 2),), ()) for start in starts]
        work = {c: (plan, chunk(chains, c)) for c, plan in enumerate(plans)}
        groups = torch.arange(32) // 4
        sampler = Sampler(counted, SAMPLER.schedule)
        begun = begin(sampler, toy_theta(), work, together)
        return estimate_gradient(sampler, toy_theta(), work, groups, lambda: None, begun=begun)

    alone = run(1, [4] * 4)
    for together, sampled in ((2, [16] * 8), (3, [24] * 4 + [8] * 4), (9, [32] * 4)):
        found = run(together, [4] * 4)
        assert sorted(batches, reverse=True)[: len(sampled)] == sampled
        for name, term in alone.terms.items():
            torch.testing.assert_close(found.terms[name].gradient, term.gradient, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.rewards, alone.rewards, rtol=1e-12, atol=1e-14)
    depths = [5, 3, 5, 2]  # each chunk's own: none is sampled further than its first-order steps
    torch.testing.assert_close(run(4, depths).total({}), run(1, depths).total({}), rtol=0, atol=0)
    assert max(batches) == SIZE


SHARES = [(1, [[0, 2], [1, 3]]), (2, [[0, 1], [2, 3]]), (1, [[3], [1, 0], [2]])]


@pytest.mark.parametrize(("together", "shares"), SHARES)
def test_several_processes_find_the_same_bits_as_one(together: int, shares: list[list[int]]) -> None:
    """Every term, half order's rows and variances; whoever has which chunk, in whichever order."""
    chains, penalty = toy_chains(32, seed=3), Penalty(0.3, toy_theta() + 0.1, [1, 3])
    options: dict[str, Any] = {"together": together, "penalty": penalty, "half_order_rows": 3}
    alone = estimate(chains, [0, 1, 2, 3], **options)

    def share(rank: int, reduce: Reduce) -> GradientEstimate:
        return estimate(chains, shares[rank], rank == 0, reduce=reduce, backwards=rank == 1, **options)

    for part in shared(len(shares), share):
        for name, term in alone.terms.items():
            assert torch.equal(part.terms[name].gradient, term.gradient) and part.terms[name].variance == term.variance
            assert part.terms[name].cut == term.cut and (term.cut is not None) == (name == "zeroth_order")
        assert torch.equal(torch.stack(part.half_order_rows), torch.stack(alone.half_order_rows))
        assert part.divergence == alone.divergence


def test_half_orders_rows_are_its_means_over_parts_of_the_chunks() -> None:
    chains = toy_chains(32, seed=3)
    single = estimate(chains, [0, 1, 2, 3], half_order_rows=9).half_order_rows
    assert len(single) == 4 and estimate(chains, [0, 1, 2, 3]).half_order_rows == []
    found = estimate(chains, [0, 1, 2, 3], half_order_rows=3)
    expected = [(single[0] + single[1]) / 2, *single[2:]]
    torch.testing.assert_close(torch.stack(list(found.half_order_rows)), torch.stack(expected), rtol=1e-12, atol=1e-14)
    whole = found.terms["half_order"].gradient
    torch.testing.assert_close(whole, torch.stack(list(single)).mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_of_chunks_is_the_exact_one_rounded(magnitude: float, dtype: torch.dtype) -> None:
    """Against fractions; numbers of one chunk differ by ten orders of magnitude; more than one block."""
    source = torch.Generator().manual_seed(0)
    sizes = magnitude * 10 ** (-10 * torch.rand(7, 300_000, generator=source, dtype=torch.float64))
    rows = (sizes * torch.randn(7, 300_000, generator=source, dtype=torch.float64)).to(dtype)
    orders = [[0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 5, 1, 3]]
    means = [ExactMean(rows[0], 7) for _ in orders]
    for mean, order in zip(means, orders, strict=True):
        for c in order:
            mean.add(c, rows[c])
    found, square = means[0].take(range(7))
    other, other_square = means[1].take(range(7))
    assert torch.equal(found, other) and square == other_square
    resolution = 2.0**-71
    for i in (0, 1, 2**18, 299_999):
        exact = float(sum((Fraction(x) for x in rows[:, i].tolist()), Fraction()) / 7)
        assert abs(float(found[i]) - exact) <= torch.finfo(dtype).eps * abs(exact) + resolution
    assert square == pytest.approx(float(rows.double().square().sum()) / 7, rel=1e-12)
    assert not means[0].take(range(7))[0].any()  # it begins anew


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -LIMIT])
def test_what_no_sum_can_hold_is_no_number_in_every_process(wrong: float) -> None:
    def work(rank: int, reduce: Reduce) -> tuple[Tensor, float]:
        mean = ExactMean(torch.zeros(3), 2, reduce)
        mean.add(rank, torch.tensor([1.0, wrong if rank else 2.0, 3.0]))
        return mean.take(range(2))

    for found, square in shared(2, work):
        assert found.isnan().all() and square != square
    with pytest.raises(ValueError, match="4097 chunks"):
        ExactMean(torch.zeros(3), 4097)


def test_signal_and_variance_are_unbiased() -> None:
    """Against a Gaussian of known mean and covariance: 4,000 means of 5, standard errors about 1 %."""
    source = torch.Generator().manual_seed(0)
    expected = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    mean, terms = ExactMean(expected, 5), []
    for rows in expected + torch.randn(4000, 5, 3, generator=source, dtype=torch.float64):
        for c, row in enumerate(rows):
            mean.add(c, row)
        terms.append(term_estimate(*mean.take(range(5)), 5))
    assert abs(sum(term.variance for term in terms) / 4000 - 3 / 5) < 0.02
    assert abs(sum(term.signal for term in terms) / 4000 - float(expected @ expected)) < 0.04


def test_zeroth_order_states_the_variance_of_its_own_mean() -> None:
    """Linear reward: each estimate is (u.g) u, whose mean over N has variance (P - 1) |g|^2 / N. 5 % apart at most."""
    g = torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seeds = [("linear", i) for i in range(4000)]
    slopes = torch.stack([DIRECTIONS.draw(seed, torch.float64) for seed in seeds]) @ g * DIRECTIONS.step_size
    term = zeroth_order(DIRECTIONS, seeds, slopes, -slopes, torch.float64)
    assert abs(term.variance / ((PARAMETERS - 1) * float(g @ g) / 4000) - 1) < 0.05
    assert float((term.gradient - g).norm() / g.norm()) < 0.12


def test_mse_weight_minimises_the_mean_squared_error() -> None:
    """Against the best factor on a grid, measured on 200,000 noisy estimates (m = 1)."""
    source = torch.Generator().manual_seed(1)
    mean = torch.tensor([0.8, 0.1], dtype=torch.float64)
    estimates = mean + 0.7 * torch.randn(200_000, 2, generator=source, dtype=torch.float64)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    errors = torch.stack([(w * estimates - mean).square().sum(1).mean() for w in grid])
    assert abs(mse_weight(float(mean @ mean) / (2 * 0.49), 1) - float(grid[errors.argmin()])) < 0.011
    assert mse_weight(-1.0, 8) == 0


def test_the_span_is_orthonormal_and_leaves_out_what_it_holds() -> None:
    vectors = list(torch.randn(3, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    basis = orthonormal_span([vectors[0], vectors[0] * -2, torch.zeros(10).double(), vectors[1], vectors[2]])
    assert basis is not None
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), atol=1e-12, rtol=0)
    for vector in vectors:
        torch.testing.assert_close(vector @ basis.T @ basis, vector, atol=1e-12, rtol=0)
    assert orthonormal_span([torch.zeros(4)]) is None


def test_guided_steps_are_as_long_as_isotropic_ones() -> None:
    """E |step|^2 = scale^2 P for both; 4,000 draws, standard error about 2 %."""
    basis = orthonormal_span(list(torch.randn(3, PARAMETERS, generator=torch.Generator().manual_seed(6))))
    guided = Directions(PARAMETERS, 0.01, basis)
    lengths = [(guided.step_size * guided.draw((i,), torch.float32)).square().sum() for i in range(4000)]
    assert abs(float(torch.stack(lengths).mean()) / (0.01**2 * PARAMETERS) - 1) < 0.06


@pytest.mark.parametrize("zeroth", [(0, 4), (3, 5)])
def test_a_pair_parts_at_its_first_perturbed_step_and_is_rated_at_once(zeroth: tuple[int, ...]) -> None:
    plan, calls = Plan(STEPS, range(STEPS, STEPS), (), zeroth), []
    chains = toy_chains(8, seed=3)

    def counted(theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        calls.append(len(latent))
        return toy_denoiser(theta, latent, timestep, conditioning)

    rated = replace(chains, objective=lambda latent: calls.append(-len(latent)) or toy_reward(latent))
    u = torch.randn(8, PARAMETERS, dtype=torch.float64)
    plus, minus = rollout(Sampler(counted, SAMPLER.schedule), toy_theta(), plan, rated, u, 0.1)
    assert sum(calls[:-1]) == 8 * plan.pair_forwards == 8 * (2 * STEPS - zeroth[0])
    assert calls[-1] == -16
    for sign, rewards in ((0.1, plus), (-0.1, minus)):
        latent = chains.x_start
        for k in range(STEPS):
            theta = toy_theta() + (sign * u if k in zeroth else 0 * u)
            latent = SAMPLER.step(theta, k, latent, chains.noise[k], {})
        torch.testing.assert_close(rewards, toy_reward(latent))
