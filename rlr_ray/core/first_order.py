"""First order: exact backpropagation of the reward through the last steps of the chain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlr_ray.core.chain import Denoiser, Objective, Trajectory, denoise_step
from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError


def first_order(
    denoiser: Denoiser,
    theta: Tensor,  # [P]
    schedule: Schedule,
    trajectory: Trajectory,
    objective: Objective,
    *,
    checkpoint_steps: bool = False,
) -> tuple[Tensor, Tensor]:  # [P], rewards [B]
    """Gradient of the mean reward through every step after the trajectory's end, and the rewards met on the way.

    The first term of the paper's equation 6, for K = T - trajectory.stop steps. Its expectation is the part of
    grad E[R] that passes through theta at those steps. `checkpoint_steps` keeps one latent a step and one step's
    activations, for one more forward a step. Raises UserError if the rewards carry no gradient.
    """
    theta = theta.detach().requires_grad_()
    latent = trajectory.latents[-1]
    for k in range(trajectory.stop, len(schedule)):
        arguments = (denoiser, theta, schedule, k, latent, trajectory.noise[k], trajectory.conditioning)
        if checkpoint_steps:
            latent = checkpoint(denoise_step, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            latent = denoise_step(*arguments)
    rewards = objective(latent)
    if not rewards.requires_grad:
        raise UserError(
            "the reward carries no gradient, so first order cannot pass through it; "
            "compute it with torch operations outside torch.no_grad(), or use no first-order steps"
        )
    (gradient,) = torch.autograd.grad(rewards.mean(), theta)
    return gradient, rewards.detach()
