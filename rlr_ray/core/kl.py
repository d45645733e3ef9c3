"""How far chains have moved from the base model's: Kullback-Leibler divergence between Gaussian steps, closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_ray.core.sampler import Sampler, Trajectory
from rlr_ray.core.schedule import Schedule


def noisy_steps(schedule: Schedule) -> list[int]:
    """Steps at which the sampler adds noise; at the others the divergence is 0 or infinite, and is left out."""
    return [k for k, sigma in enumerate(schedule.sigma) if sigma]


@torch.no_grad()
def chain_divergence(
    sampler: Sampler,
    theta: Tensor,  # [P] where the trajectory was sampled
    base: Tensor,  # [P]
    trajectory: Trajectory,
) -> Tensor:  # [B], nats
    """Of each chain: `sum_k |m_k(x_k; theta) - m_k(x_k; base)|^2 / (2 sigma_k^2)`, m_k a step's mean.

    A step's two Gaussians share their sigma, so this is exact at the states x_k that were visited, and by the chain
    rule its expectation is the divergence between the laws of the whole chains.
    """
    total = torch.zeros(trajectory.latents.shape[1], device=theta.device, dtype=theta.dtype)
    for k in noisy_steps(sampler.schedule):
        total += _step_divergence(sampler, theta, base, trajectory, k)
    return total


def divergence_gradient(
    sampler: Sampler,
    theta: Tensor,  # [P]
    base: Tensor,  # [P]
    trajectory: Trajectory,
    steps: Sequence[int],
) -> tuple[Tensor, Tensor]:  # [P], [B] nats
    """Gradient of the mean of `chain_divergence` with the visited states held, and the divergence; a step at a time.

    `steps` drawn evenly from `noisy_steps` stand for all of them: then both are unbiased. That states were visited
    because of theta is left out, as DPOK (Fan et al. 2023, arXiv:2305.16381) and Flow-GRPO do.
    """
    theta = theta.detach().requires_grad_()
    gradient, total = torch.zeros_like(theta), theta.new_zeros(trajectory.latents.shape[1])
    share = len(noisy_steps(sampler.schedule)) / len(steps)
    for k in steps:
        divergence = share * _step_divergence(sampler, theta, base, trajectory, k)
        gradient += torch.autograd.grad(divergence.mean(), theta)[0]
        total = total + divergence.detach()
    return gradient, total


def _step_divergence(sampler: Sampler, theta: Tensor, base: Tensor, trajectory: Trajectory, k: int) -> Tensor:  # [B]
    arguments = (k, trajectory.latents[k], trajectory.conditioning)
    with torch.no_grad():
        expected = sampler.mean(base, *arguments)
    moved = (sampler.mean(theta, *arguments) - expected) / sampler.schedule.sigma[k]
    return moved.flatten(1).square().sum(1) / 2
