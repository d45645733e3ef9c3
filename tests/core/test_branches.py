"""Half order by antithetic branches: against a plain loop, against the exact gradient, and beside REINFORCE."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.half_order import branch_advantages, draw_branches, half_order
from rlr_ray.core.sampler import Chains, Conditioning, Sampler
from rlr_ray.lab.toy import STEPS, toy_chains, toy_denoiser, toy_reward, toy_sampler, toy_theta
from tests.toy import exact_gradient, per_chain_theta, toy_trajectory, worst_z

SAMPLER, COUNT = toy_sampler(), 20_000
SUB_CHAINS = [range(2, 3), range(1, 3), range(2, 5), range(0, 6)]


def partners(chains: Chains, step: int) -> Tensor:  # [B]
    """Rewards of chains run anew from their start, with the noise of one step negated."""
    noise = chains.noise.clone()
    noise[step] *= -1
    return toy_reward(toy_sampler().sample(toy_theta(), chains.x_start, noise, {}).latents[-1])


@pytest.mark.parametrize("rows", [None, 1, 17, 24])
def test_a_partner_is_the_chain_with_one_noise_negated(rows: int | None) -> None:
    chains, steps = toy_chains(8, seed=3), [4, 0, 2, 5]
    trajectory, batches = toy_trajectory(chains), list[int]()

    def counted(theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        assert len(conditioning["chain"]) == len(latent) and not torch.is_grad_enabled()
        assert torch.equal(conditioning["chain"], torch.arange(8).repeat(len(latent) // 8))
        batches.append(len(latent))
        return toy_denoiser(theta, latent, timestep, conditioning)

    def rated(latent: Tensor) -> Tensor:  # [m, n B]
        batches.append(-len(latent))
        return torch.stack([toy_reward(latent), latent.flatten(1).sum(1)])

    trajectory = type(trajectory)(trajectory.latents, trajectory.noise, {"chain": torch.arange(8)})
    parts = rated(trajectory.latents[-1])
    batches.clear()
    sampler = Sampler(counted, SAMPLER.schedule)
    found = branch_advantages(sampler, toy_theta(), trajectory, parts, rated, steps, rows=rows)
    assert found.shape == (4, 2, 8)
    for advantage, step in zip(found, steps, strict=True):
        torch.testing.assert_close(advantage[0], (parts[0] - partners(chains, step)) / 2, rtol=1e-10, atol=1e-12)
    most = {None: 32, 1: 8, 17: 16, 24: 24}[rows]
    assert max(map(abs, batches)) == most
    assert sum(size for size in batches if size > 0) == 8 * sum(STEPS - 1 - step for step in steps)
    assert sum(size for size in batches if size < 0) == -8 * 4
    if rows is None:
        assert batches == [8, 8, 16, 16, 24, -32]


@functools.cache
def toy() -> tuple[Chains, Any, Tensor]:
    chains = toy_chains(COUNT, seed=5)
    trajectory = toy_trajectory(chains)
    return chains, trajectory, toy_reward(trajectory.latents[-1])


@functools.cache
def advantages() -> dict[int, Tensor]:
    _, trajectory, rewards = toy()
    steps = range(STEPS)
    return dict(
        zip(steps, branch_advantages(SAMPLER, toy_theta(), trajectory, rewards, toy_reward, steps), strict=True)
    )


def estimates(sub_chain: range, advantage: Tensor) -> Tensor:  # [B, P]
    chains, trajectory, _ = toy()
    return COUNT * half_order(SAMPLER, per_chain_theta(chains), trajectory, sub_chain, advantage)


@pytest.mark.parametrize("sub_chain", SUB_CHAINS, ids=str)
def test_branches_are_unbiased(sub_chain: range) -> None:
    """20,000 chains; paired with the exact gradient of the same."""
    found = estimates(sub_chain, advantages()[sub_chain[-1]])
    assert worst_z(found, exact_gradient(toy()[0], sub_chain)) < 3.5


@pytest.mark.parametrize("step", [0, 3, 5])
def test_branches_vary_less_than_reinforce(step: int) -> None:
    """Noise .029 at step 5. Rewards centred for REINFORCE over all chains; standard errors about 3 %."""
    sub_chain = range(step, step + 1)
    rewards = toy()[2]
    centred = (rewards - rewards.mean()) * COUNT / (COUNT - 1)
    branches, path = (float(estimates(sub_chain, a).var(0).sum()) for a in (advantages()[step], centred))
    assert branches / path == pytest.approx({0: 0.30, 3: 0.41, 5: 0.003}[step], rel=0.25)


ERRORS = {"not halved": 2.0, "divided by the pair's size once more": 0.5}


@pytest.mark.parametrize("error", ERRORS)
def test_deliberate_errors_are_seen(error: str) -> None:
    found = ERRORS[error] * estimates(range(2, 3), advantages()[2])
    assert worst_z(found, exact_gradient(toy()[0], [2])) > 5


def test_drawn_sub_chains_stand_for_all() -> None:
    """Each of 5 in two fifths of 4,000 draws, weighted by 5 / 2; standard error .008. Draws of one chunk are alike."""
    sub_chains = [range(k, k + 2) for k in range(0, 10, 2)]
    counts: Counter[range] = Counter()
    for index in range(4000):
        drawn, weight = draw_branches(sub_chains, 2, 7, "branches", index)
        assert len(set(drawn)) == 2 and weight == 5 / 2 and drawn == sorted(drawn, key=lambda block: block[0])
        counts.update(drawn)
    assert all(abs(counts[block] * weight / 4000 - 1) < 0.07 for block in sub_chains)
    assert draw_branches(sub_chains, 2, 7, "branches", 5) == draw_branches(sub_chains, 2, 7, "branches", 5)
    assert draw_branches(sub_chains, 9, 0) == (sub_chains, 1.0)
