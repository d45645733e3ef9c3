"""First order: exact backpropagation of the reward through the last steps of the chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlr_ray.core.sampler import Objective, Sampler, Trajectory
from rlr_ray.errors import UserError


def first_order(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,
    objective: Objective,
    *,
    checkpoint_steps: bool = False,
    step_weights: Sequence[float] | None = None,  # [K]
) -> tuple[Tensor, Tensor, Trajectory]:  # [P], what the objective said, the whole chain
    """Gradient of the mean reward through every step after the trajectory's end, with what is met on the way.

    Of an objective of several parts, those without a gradient count as constants.

    The first term of the paper's equation 6, for K = T - trajectory.stop steps. Its expectation is the part of
    grad E[R] that passes through theta at those steps. `checkpoint_steps` keeps one latent a step and one step's
    activations, for one more forward a step. `step_weights` multiply what passes through theta at each step: the
    inverse probability of reaching it, if K is drawn at random. Raises UserError if the rewards carry no gradient.
    """
    theta = theta.detach().requires_grad_()
    thetas = [theta] * (len(sampler) - trajectory.stop)
    if step_weights is not None:
        thetas = [_scale_gradient(theta, weight) for weight in step_weights]
    rewards, whole = _finish(sampler, thetas, trajectory, objective, checkpoint_steps)
    (gradient,) = torch.autograd.grad(torch.atleast_2d(rewards).sum(0).mean(), theta)
    return gradient, rewards.detach(), whole


def step_gradients(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,
    objective: Objective,
) -> tuple[Tensor, Tensor]:  # [K, P], rewards [B]
    """First order taken apart: the gradient of the mean reward through theta at each step alone, checkpointed.

    The exact answer that any estimate of these steps is compared with.
    """
    count = len(sampler) - trajectory.stop
    copies = theta.detach().expand(count, *theta.shape).clone().requires_grad_()
    rewards, _ = _finish(sampler, list(copies.unbind()), trajectory, objective, True)
    (gradients,) = torch.autograd.grad(rewards.mean(), copies)
    return gradients, rewards.detach()


def _finish(
    sampler: Sampler,
    thetas: Sequence[Tensor],  # [K] of [P]
    trajectory: Trajectory,
    objective: Objective,
    checkpoint_steps: bool,
) -> tuple[Tensor, Trajectory]:  # rewards [B] with their graph, the whole chain without
    """Run the steps after the trajectory's end with gradients, and rate the last latent."""
    latents = [trajectory.latents[-1]]
    for theta, k in zip(thetas, range(trajectory.stop, len(sampler)), strict=True):
        arguments = (theta, k, latents[-1], trajectory.noise[k], trajectory.conditioning)
        if checkpoint_steps:
            latents.append(checkpoint(sampler.step, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            latents.append(sampler.step(*arguments))
    rewards = objective(latents[-1])
    if not rewards.requires_grad:
        raise UserError(
            "the reward carries no gradient, so first order cannot pass through it; "
            "compute it with torch operations outside torch.no_grad(), or use no first-order steps"
        )
    whole = torch.cat([trajectory.latents[:-1], torch.stack([latent.detach() for latent in latents])])
    return rewards, Trajectory(whole, trajectory.noise, trajectory.conditioning)


def _scale_gradient(theta: Tensor, factor: float) -> Tensor:
    """Theta itself, whose gradient is multiplied."""
    fixed = theta.detach()
    return fixed + factor * (theta - fixed)
