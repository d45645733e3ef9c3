"""First order chain by chain, the linear adjoint and clipped means, against autograd and plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.first_order import ClippedMean, first_order, linear_adjoint
from rlr_ray.core.sampler import Chains
from rlr_ray.core.sums import ExactMean, Reduce
from rlr_ray.core.weighting import Cut, TermEstimate
from rlr_ray.errors import UserError
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains, toy_reward, toy_sampler, toy_theta
from tests.runs import shared
from tests.toy import beside_the_gradient, exact_gradient, per_chain_theta, toy_trajectory

SAMPLER = toy_sampler()
CHUNKS, SIZE = 4, 5


@pytest.mark.parametrize("checkpoint_steps", [False, True])
@pytest.mark.parametrize("last", [1, 3, STEPS])
def test_chains_gradients_are_autograds_chain_by_chain(last: int, checkpoint_steps: bool) -> None:
    chains = toy_chains(16, seed=3)
    arguments: Any = (SAMPLER, toy_theta(), toy_trajectory(chains, STEPS - last), toy_reward)
    each, rewards, whole = first_order(*arguments, checkpoint_steps=checkpoint_steps, per_chain=True)
    torch.testing.assert_close(each, exact_gradient(chains, range(STEPS - last, STEPS)), rtol=1e-11, atol=1e-13)
    mean, met, same = first_order(*arguments, checkpoint_steps=checkpoint_steps)
    torch.testing.assert_close(each.mean(0), mean, rtol=1e-11, atol=1e-13)
    assert torch.equal(rewards, met) and torch.equal(whole.latents, same.latents)


@pytest.mark.parametrize("checkpoint_steps", [False, True])
def test_a_roulettes_weights_are_those_of_each_chain(checkpoint_steps: bool) -> None:
    chains, weights = toy_chains(16, seed=3), [4.0, 0.5, 2.0, 1.0]
    each, _, _ = first_order(
        *(SAMPLER, toy_theta(), toy_trajectory(chains, 2), toy_reward),
        **{"checkpoint_steps": checkpoint_steps, "step_weights": weights, "per_chain": True},
    )
    expected = sum(weight * exact_gradient(chains, [k]) for weight, k in zip(weights, range(2, STEPS), strict=True))
    torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-13)


def test_parts_without_a_gradient_are_constants_of_each_chain() -> None:
    chains = toy_chains(8, seed=3)
    arguments: Any = (SAMPLER, toy_theta(), toy_trajectory(chains, 0))
    both, _, _ = first_order(
        *arguments, lambda x: torch.stack([toy_reward(x).detach() ** 2, toy_reward(x)]), per_chain=True
    )
    one, _, _ = first_order(*arguments, toy_reward, per_chain=True)
    assert torch.equal(both, one)


# Linear adjoint.


def detached_inputs(chains: Chains, steps: range) -> Tensor:  # [B, P]
    """Autograd through a chain whose denoiser sees detached latents; theta counts at `steps`."""
    theta, latent = per_chain_theta(chains).requires_grad_(), chains.x_start
    for k in range(STEPS):
        output = SAMPLER.denoiser(
            theta if k in steps else theta.detach(), latent.detach(), SAMPLER.schedule.timesteps[k], {}
        )
        latent = SAMPLER.schedule.mean(k, latent, output) + SAMPLER.schedule.sigma[k] * chains.noise[k]
    (gradient,) = torch.autograd.grad(toy_reward(latent).sum(), theta)
    return gradient


@pytest.mark.parametrize("steps", [range(STEPS), range(4, STEPS), range(1, 3)], ids=str)
def test_the_linear_adjoint_is_autograd_with_detached_inputs(steps: range) -> None:
    chains = toy_chains(16, seed=3)
    arguments: Any = (SAMPLER, toy_theta(), toy_trajectory(chains), toy_reward, steps)
    each, rewards = linear_adjoint(*arguments, per_chain=True)
    torch.testing.assert_close(each, detached_inputs(chains, steps), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(linear_adjoint(*arguments)[0], each.mean(0), rtol=1e-11, atol=1e-13)
    assert torch.equal(rewards, toy_reward(toy_trajectory(chains).latents[-1]))
    doubled, _ = linear_adjoint(*arguments, step_weights=[2.0] * len(steps), per_chain=True)
    torch.testing.assert_close(doubled, 2 * each, rtol=1e-12, atol=1e-14)


def test_drawn_steps_of_the_linear_adjoint_stand_for_all() -> None:
    """All 15 pairs of 6 steps, each at 6 / 2: their mean is the whole, exactly; the last step alone is first order."""
    chains = toy_chains(16, seed=3)
    arguments: Any = (SAMPLER, toy_theta(), toy_trajectory(chains), toy_reward)
    pairs = list(itertools.combinations(range(STEPS), 2))
    drawn = [linear_adjoint(*arguments, pair, step_weights=[STEPS / 2] * 2)[0] for pair in pairs]
    whole, _ = linear_adjoint(*arguments, range(STEPS))
    torch.testing.assert_close(torch.stack(drawn).mean(0), whole, rtol=1e-11, atol=1e-13)
    last, _ = linear_adjoint(*arguments, [STEPS - 1], per_chain=True)
    torch.testing.assert_close(last, exact_gradient(chains, [STEPS - 1]), rtol=1e-11, atol=1e-13)


def test_the_linear_adjoints_expectation_is_biased_as_the_docstring_says() -> None:
    """5,000 chains; standard errors over tenths of them."""
    chains = toy_chains(5000, seed=5)
    each, _ = linear_adjoint(SAMPLER, toy_theta(), toy_trajectory(chains), toy_reward, range(STEPS), per_chain=True)
    measured, error = beside_the_gradient(each, exact_gradient(chains, range(STEPS)))
    assert (error / measured < 0.03).all()
    assert ((measured - torch.tensor([0.74, 3.2])).abs() < 3.5 * error).all()
    assert 1 - measured[0] > 3.5 * error[0]


def test_it_refuses_a_reward_without_gradient() -> None:
    chains = toy_chains(4, seed=3)
    with pytest.raises(UserError, match="carries no gradient"):
        first_order(SAMPLER, toy_theta(), toy_trajectory(chains, 5), lambda x: toy_reward(x).detach())
    with pytest.raises(UserError, match="carries no gradient"):
        linear_adjoint(SAMPLER, toy_theta(), toy_trajectory(chains), lambda x: toy_reward(x).detach(), range(STEPS))


# Clipped means.


def rows(dtype: torch.dtype = torch.float32) -> Tensor:  # [chunks, b, P]
    """Gradients whose lengths differ by orders of magnitude, also between chunks."""
    source = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, CHUNKS * SIZE)[torch.randperm(CHUNKS * SIZE, generator=source)]
    each = sizes[:, None] * torch.randn(CHUNKS * SIZE, PARAMETERS, generator=source)
    return (each.view(CHUNKS, SIZE, -1) * torch.tensor([1.0, 5.0, 0.2, 1.0])[:, None, None]).to(dtype)


def clipped(
    gradients: Tensor, chunks: list[int], *, reference: float | None = None, reduce: Reduce = lambda value: value
) -> tuple[TermEstimate, float]:
    mean = ClippedMean(ExactMean(gradients[0, 0], len(gradients), reduce), 0.5, reference=reference)
    for c in chunks:
        mean.add(c, gradients[c].clone())
        assert reference is None or not mean.waiting
    return mean.take(len(gradients))


@pytest.mark.parametrize("reference", [None, 3.0])
def test_each_chain_is_cut_to_a_share_of_the_median_of_all(reference: float | None) -> None:
    """Against a plain loop over chains."""
    gradients = rows(torch.float64)
    norms = sorted(float(g.norm()) for g in gradients.flatten(0, 1))
    median = norms[(len(norms) - 1) // 2]
    limit = 0.5 * (median if reference is None else reference)
    cut = [g * min(1.0, limit / float(g.norm())) for g in gradients.flatten(0, 1)]
    found, its_median = clipped(gradients, [0, 1, 2, 3], reference=reference)
    expected = torch.stack(cut).mean(0)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-12, atol=1e-14)
    spread = sum(float((g - expected).square().sum()) for g in cut) / (len(cut) - 1)
    assert found.variance == pytest.approx(spread / len(cut), rel=1e-9)
    assert its_median == pytest.approx(median)
    assert found.cut is not None and found.cut.share == sum(norm > limit for norm in norms) / len(norms)
    assert found.cut.length == pytest.approx(1 - sum(min(norm, limit) for norm in norms) / sum(norms))


@pytest.mark.parametrize("reference", [None, 3.0])
@pytest.mark.parametrize("shares", [[[0, 2], [3, 1]], [[3], [2, 1, 0]]])
def test_clipped_means_have_the_same_bits_whoever_has_which_chunk(
    shares: list[list[int]], reference: float | None
) -> None:
    gradients = rows()
    alone, median = clipped(gradients, [0, 1, 2, 3], reference=reference)

    def work(rank: int, reduce: Reduce) -> tuple[TermEstimate, float]:
        return clipped(gradients, shares[rank], reference=reference, reduce=reduce)

    for part, its_median in shared(2, work):
        assert torch.equal(part.gradient, alone.gradient)
        assert (part.variance, part.cut, its_median) == (alone.variance, alone.cut, median)


def test_chains_without_a_gradient_do_not_set_the_median() -> None:
    """Else a reward that is flat for most chains would be clipped to nothing."""
    gradients = rows()
    gradients[:, 1:] = 0
    (found, median), (dense, its_median) = (clipped(one, [0, 1, 2, 3]) for one in (gradients, gradients[:, :1].clone()))
    assert median == its_median > 0
    torch.testing.assert_close(found.gradient, dense.gradient / SIZE)
    nothing, _ = clipped(torch.zeros_like(gradients), [0, 1, 2, 3])
    assert not nothing.gradient.any() and nothing.cut == Cut(0.0, 0.0)


@pytest.mark.parametrize("reference", [None, 3.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_chain_that_is_no_number_is_not_hidden_by_clipping(wrong: float, reference: float | None) -> None:
    gradients = rows()
    gradients[2, 1, 0] = wrong
    assert clipped(gradients, [0, 1, 2, 3], reference=reference)[0].gradient.isnan().all()
