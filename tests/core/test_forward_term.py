"""The forward term against autograd on the same loss in other words, and how its expectation lies to the gradient."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.forward_term import Weighting, forward_draws, forward_steps, forward_term
from rlr_ray.core.half_order import leave_one_out
from rlr_ray.core.sampler import Conditioning, Sampler
from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule
from rlr_ray.errors import UserError
from rlr_ray.lab.toy import SCHEDULER, STEPS, toy_chains, toy_denoiser, toy_reward, toy_sampler, toy_theta
from tests.toy import beside_the_gradient, exact_gradient, toy_trajectory

SAMPLER = toy_sampler()
ALPHAS = [float(SCHEDULER.alphas_cumprod.double()[int(t)]) for t in SAMPLER.schedule.timesteps]
WEIGHTINGS: list[Weighting] = ["uniform", "elbo", "velocity"]


def drawn(count: int, draws: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Last latents, advantages, steps [B, K] in which a chain may have one twice, and noises."""
    source = torch.Generator().manual_seed(seed)
    latents, advantage = torch.randn(count, 2, 1, 1, generator=source).double(), torch.randn(count, generator=source)
    steps = torch.randint(0, STEPS - 1, (count, draws), generator=source)
    return latents, advantage.double(), steps, torch.randn(draws, count, 2, 1, 1, generator=source).double()


def as_prediction(kind: str) -> Callable[..., Tensor]:
    """The toy denoiser, which predicts the noise e, as a model that predicts something else; a flow's latent too."""

    def denoiser(theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        alpha = ALPHAS[SAMPLER.schedule.timesteps.index(timestep)]
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        x = latent * (signal + noise) if kind == "flow" else latent
        e = toy_denoiser(theta, x, timestep, conditioning)
        clean = (x - noise * e) / signal
        return {"epsilon": e, "v_prediction": signal * e - noise * clean, "sample": clean, "flow": e - clean}[kind]

    return denoiser


def sampler_of(kind: str) -> Sampler:
    times = SAMPLER.schedule.timesteps
    if kind == "flow":
        sigmas = [(1 - a) ** 0.5 / (a**0.5 + (1 - a) ** 0.5) for a in ALPHAS]
        return Sampler(as_prediction(kind), flow_schedule(times, [*sigmas, 0.0], noise_level=0.7))
    outs = [*ALPHAS[1:], float(SCHEDULER.final_alpha_cumprod)]
    return Sampler(as_prediction(kind), ddim_schedule(times, ALPHAS, outs, eta=1.0, prediction_type=kind))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_it_is_autograd_on_the_loss_in_words_of_the_papers(weighting: Weighting) -> None:
    """A chain and a draw at a time: |e error|^2 / 2, |v error|^2 / 2, (SNR' - SNR) / 2 |x0 error|^2; and a pull."""
    latents, advantage, steps, noise = drawn(5, 3)
    theta, reference, loss = toy_theta().requires_grad_(), toy_theta() + 0.3, torch.zeros((), dtype=torch.float64)

    def in_units(e: Tensor, x: Tensor, a: float) -> Tensor:
        clean = (x - (1 - a) ** 0.5 * e) / a**0.5
        return {"uniform": e, "velocity": a**0.5 * e - (1 - a) ** 0.5 * clean, "elbo": clean}[weighting]

    for b, i in itertools.product(range(5), range(3)):
        a, after = ALPHAS[k := int(steps[b, i])], ALPHAS[k + 1]
        x = a**0.5 * latents[b : b + 1] + (1 - a) ** 0.5 * noise[i, b]
        said, before = (toy_denoiser(which, x, SAMPLER.schedule.timesteps[k], {}) for which in (theta, reference))
        error, moved = (
            (in_units(said, x, a) - in_units(other, x, a)).square().sum() for other in (noise[i, b : b + 1], before)
        )
        weight = after / (1 - after) - a / (1 - a) if weighting == "elbo" else 1.0
        loss = loss + weight * (advantage[b] * error + 0.2 * moved) / 2
    (expected,) = torch.autograd.grad(-loss * 0.7 / 5, theta)
    found = forward_term(
        *(SAMPLER, toy_theta(), latents, {}, advantage, steps, noise),
        **{"weighting": weighting, "scale": 0.7, "pull": 0.2, "reference": reference},
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_it_is_the_same_for_every_prediction_type(kind: str) -> None:
    """One model in four ways of saying it; a flow's v is another unit than DDIM's, so its weights by it differ."""
    latents, *others = drawn(64, 2)
    arguments: Any = (toy_theta(), latents, {}, *others)
    for weighting in WEIGHTINGS[:2] if kind == "flow" else WEIGHTINGS:
        expected = forward_term(SAMPLER, *arguments, weighting=weighting)
        found = forward_term(sampler_of(kind), *arguments, weighting=weighting)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        without_noise = forward_term(toy_sampler(eta=0.0), *arguments, weighting=weighting)
        assert torch.equal(without_noise, expected)  # nothing of the chain's own steps is read


def test_draws_stand_for_the_sum_over_the_range() -> None:
    """Exactly, over all 15 pairs of 6 steps, if a step's noise is the same in each; so do chains' own estimates."""
    latents, advantage, _, _ = drawn(8, 1)
    noise = torch.randn(STEPS, 8, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = forward_term(
        SAMPLER, toy_theta(), latents, {}, advantage, torch.arange(STEPS).expand(8, -1), noise, weighting="elbo"
    )
    pairs = list(itertools.combinations(range(STEPS), 2))
    estimates = [
        forward_term(
            *(SAMPLER, toy_theta().expand(8, -1), latents, {}, advantage, torch.tensor(pair).expand(8, -1)),
            noise[list(pair)],
            **{"weighting": "elbo", "scale": STEPS / 2},
        ).sum(0)
        for pair in pairs
    ]
    torch.testing.assert_close(torch.stack(estimates).mean(0), whole, rtol=1e-9, atol=1e-12)


# How it lies to the gradient: 5,000 chains, all steps; standard errors over tenths of them.

COUNT = 5_000


@functools.cache
def rewards_and_gradients() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards [B], last latents, and each chain's exact gradient [B, P]."""
    chains = toy_chains(COUNT, seed=5)
    latents = toy_trajectory(chains).latents[-1]
    return toy_reward(latents), latents, exact_gradient(chains, range(STEPS))


@functools.cache
def without_advantage(weighting: Weighting) -> Tensor:  # [B, P]
    """Each chain's own term at advantage 1; the term is linear in it."""
    noise = torch.randn(STEPS, COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    latents = rewards_and_gradients()[1]
    steps, ones = torch.arange(STEPS).expand(COUNT, -1), torch.ones(COUNT, dtype=torch.float64)
    theta = toy_theta().expand(COUNT, -1).clone()
    return forward_term(SAMPLER, theta, latents, {}, ones, steps, noise, weighting=weighting, scale=COUNT)


@functools.cache
def centred() -> Tensor:  # [B]
    return leave_one_out(rewards_and_gradients()[0], torch.zeros(COUNT))


def beside(estimates: Tensor) -> tuple[Tensor, Tensor]:
    return beside_the_gradient(estimates, rewards_and_gradients()[2])


MEASURED = {"uniform": (0.81, 0.44), "elbo": (0.88, 38.0)}  # 10,000 other chains; the docstring's figures


@pytest.mark.parametrize("weighting", MEASURED)
def test_its_expectation_is_biased_as_the_docstring_says(weighting: Weighting) -> None:
    """Standard error of the cosine about .02, of the length 3 to 7 %; elbo has nearly all of its from the last step."""
    measured, error = beside(centred()[:, None] * without_advantage(weighting))
    assert (error / measured < 0.08).all()
    assert ((measured - torch.tensor(MEASURED[weighting])).abs() < 3.5 * error).all()
    assert 1 - measured[0] > 3.5 * error[0]


# Each must leave what the right term's test allows.
ERRORS = {
    "no baseline": lambda: rewards_and_gradients()[0][:, None] * without_advantage("uniform"),
    "a running baseline alone, off by .5": lambda: (centred() + 0.5)[:, None] * without_advantage("uniform"),
    "a mean with the chain's own reward over groups of 2": lambda: (
        centred()[:, None] / 2 * without_advantage("uniform")
    ),
    "another weighting": lambda: centred()[:, None] * without_advantage("elbo"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_deliberate_errors_are_seen(error: str) -> None:
    measured, error_of = beside(ERRORS[error]())
    assert ((measured - torch.tensor(MEASURED["uniform"])).abs() > 5 * error_of).any(), measured


def test_without_an_advantage_its_mean_is_longer_than_the_gradient() -> None:
    """1.5 +- .05 times |g| on this chain, nearly at right angles to g: what centring takes away."""
    (cosine, length), (_, error) = beside(without_advantage("uniform"))
    assert length - 1 > 3.5 * error
    assert abs(cosine) < 0.2


def test_a_pull_alone_is_nothing_at_the_reference_and_leads_to_it() -> None:
    latents, _, steps, noise = drawn(64, 2)
    arguments = (latents, {}, torch.zeros(64).double(), steps, noise)
    reference = toy_theta() + 0.01
    at, away = (
        forward_term(SAMPLER, theta, *arguments, pull=2.0, reference=reference) for theta in (reference, toy_theta())
    )
    assert not at.any()
    assert away @ (reference - toy_theta()) > 0
    assert not forward_term(SAMPLER, toy_theta(), *arguments).any()


def test_steps_go_by_signal_level_or_to_the_nearest() -> None:
    """Alpha-bar .005, .028, .105, .278, .537, .805; of a flow scaled to the same."""
    for schedule in (SAMPLER.schedule, sampler_of("flow").schedule):
        assert forward_steps(schedule, 0.03, 0.4) == (2, 3)
        assert forward_steps(schedule, 0.0, 1.0) == tuple(range(STEPS))
        assert forward_steps(schedule, 0.0, 1.0, stop=STEPS - 1) == tuple(range(STEPS - 1))
        assert forward_steps(schedule, 0.6, 0.7) == (4,)
        assert forward_steps(schedule, 0.9, 1.0) == (STEPS - 1,)
        assert forward_steps(schedule, 0.0, 0.001) == (0,)


def test_draws_are_a_chains_own_and_do_not_repeat_while_there_are_others() -> None:
    seeds = [(1, "forward", 0, index) for index in range(3000)]
    steps, noise = forward_draws((2, 3, 4, 5), 3, (1, 1, 1), seeds)
    assert steps.shape == (3000, 3) and noise.shape == (3, 3000, 1, 1, 1)
    assert all(len(set(row)) == 3 for row in steps.tolist())
    assert (torch.bincount(steps.flatten())[2:] / 9000 - 0.25).abs().max() < 0.02
    others = forward_draws((2, 3, 4, 5), 3, (1, 1, 1), seeds[7:9])
    assert torch.equal(others[0], steps[7:9]) and torch.equal(others[1], noise[:, 7:9])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    again, _ = forward_draws((4,), 3, (1, 1, 1), seeds[:2])
    assert again.tolist() == [[4] * 3] * 2


def test_what_it_cannot_do_is_refused() -> None:
    latents, advantage, _, noise = drawn(2, 1)
    arguments: Any = (toy_theta(), latents, {}, advantage, torch.full((2, 1), STEPS - 1), noise)
    with pytest.raises(UserError, match="ends without noise, so its elbo weight is infinite; lower"):
        forward_term(sampler_of("flow"), *arguments, weighting="elbo")
    with pytest.raises(UserError, match="'snr'; allowed: uniform, elbo, velocity"):
        forward_term(SAMPLER, *arguments, weighting="snr")  # type: ignore[arg-type]
    bare = Schedule((1.0,), (1.0,), (0.1,), (0.5,))
    with pytest.raises(UserError, match="give Schedule its `clean`, `signal` and `noise`"):
        forward_term(Sampler(toy_denoiser, bare), *arguments)
