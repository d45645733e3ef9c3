"""Kullback-Leibler divergence of chains from the base model's: between Gaussian steps, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_ray.core.sampler import Conditioning, Sampler, Trajectory


def compared_steps(sampler: Sampler) -> list[int]:
    """Steps that are theta's and have noise; without it the divergence is 0 or infinite, and is left out."""
    return [k for k in range(sampler.trained) if sampler.schedule.sigma[k]]


@torch.no_grad()
def divergence_by_step(
    sampler: Sampler,
    theta: Tensor,  # [P] where the trajectory was sampled
    base: Tensor,  # [P]
    trajectory: Trajectory,
) -> Tensor:  # [T, B], nats
    """Divergence of each step and chain: `|m_k(x_k; theta) - m_k(x_k; base)|^2 / (2 sigma_k^2)`, m_k the step's mean.

    A step's two Gaussians share their sigma, so this is exact at the states x_k that were visited, and by the chain
    rule the expectation of its sum over steps is the divergence between the laws of the whole chains. 0 where the
    sampler takes the base model's step, nan where theta's has no noise, and everywhere if that is all of them.
    """
    steps, unknown = compared_steps(sampler), float("nan")
    shape = len(sampler), trajectory.latents.shape[1]
    rows = torch.full(shape, unknown, device=theta.device, dtype=theta.dtype)
    rows[sampler.trained :] = 0.0 if steps else unknown
    for k in steps:
        rows[k] = _step_divergence(sampler, theta, base, trajectory, k)
    return rows


def divergence_gradient(
    sampler: Sampler,
    theta: Tensor,  # [P]
    base: Tensor,  # [P]
    trajectory: Trajectory,
    steps: Sequence[int],
) -> tuple[Tensor, Tensor]:  # [P], [B] nats
    """Gradient of the mean of the chains' divergence with the visited states held, and that; a step at a time.

    `steps` drawn evenly from `compared_steps` stand for all of them: then both are unbiased. That states were visited
    because of theta is left out, as DPOK (Fan et al. 2023, arXiv:2305.16381) and Flow-GRPO do.
    """
    theta = theta.detach().requires_grad_()
    gradient, total = torch.zeros_like(theta), theta.new_zeros(trajectory.latents.shape[1])
    share = len(compared_steps(sampler)) / len(steps)
    for k in steps:
        divergence = share * _step_divergence(sampler, theta, base, trajectory, k)
        gradient += torch.autograd.grad(divergence.mean(), theta)[0]
        total = total + divergence.detach()
    return gradient, total


def _step_divergence(sampler: Sampler, theta: Tensor, base: Tensor, trajectory: Trajectory, k: int) -> Tensor:  # [B]
    arguments = (k, trajectory.at(k), trajectory.conditioning)
    with torch.no_grad():
        expected = sampler.mean(base, *arguments)
    moved = (sampler.mean(theta, *arguments) - expected) / sampler.schedule.sigma[k]
    return moved.flatten(1).square().sum(1) / 2


@torch.no_grad()
def drift(sampler: Sampler, theta: Tensor, trajectory: Trajectory, k: int) -> float:  # theta: [P]
    """Divergence of step k as another process took it from this one's at the same theta, nats, a mean over chains.

    `|x_(k+1) - sigma z_k - m_k(x_k; theta)|^2 / (2 sigma^2)`: the other's own mean is what it added sigma z_k to, and
    the two Gaussians share sigma. Needs the latents at both ends of the step, which must have noise.
    """
    sigma = sampler.schedule.sigma[k]
    theirs = trajectory.at(k + 1) - sigma * trajectory.noise[k]
    ours = sampler.mean(theta, k, trajectory.at(k), trajectory.conditioning)
    return float(((theirs - ours) / sigma).double().flatten(1).square().sum(1).mean() / 2)


@torch.no_grad()
def prediction_change(
    sampler: Sampler,
    before: Tensor,  # [P]
    after: Tensor,  # [P]
    k: int,
    latents: Tensor,  # [B, C, H, W] at step k's input
    conditioning: Conditioning,
) -> float:
    """`|f(after) - f(before)| / |f(before)|`: f the denoiser's predictions, |.| the root of the mean square over all.

    What an update did to the model, in units that mean the same for any adapter, parametrisation and optimizer.
    """
    was, now = (sampler.denoiser(at, latents, sampler.schedule.timesteps[k], conditioning) for at in (before, after))
    return float((now - was).double().norm() / was.double().norm())
