"""Half order: a likelihood ratio on the sampler's own noise, with backpropagation inside one sub-chain."""

from __future__ import annotations

import torch
from torch import Tensor

from rlr_ray.core.sampler import Sampler, Trajectory
from rlr_ray.errors import UserError


def half_order(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,
    sub_chain: range,
    advantage: Tensor,  # [B]
) -> Tensor:  # [P]
    """Likelihood-ratio gradient for the steps of `sub_chain`, averaged over the chains.

    The second term of the paper's equation 6. From the stored latent at the first step's input, differentiates the
    composed mean m of the last step j, the noises in between held at their sampled values, and returns the mean over
    chains of `advantage * (dm/dtheta)^T z_j / sigma_j`. One step is REINFORCE (DDPO without its clipping).
    Its expectation is the part of grad E[R] that passes through theta at those steps, if the advantage is the reward
    minus a baseline that does not use the chain's own reward. Raises UserError where the last step has no noise.
    """
    last = sub_chain[-1]
    sigma = sampler.schedule.sigma[last]
    if not sigma:
        raise UserError(
            f"half order ends at step {last}, where the sampler adds no noise (sigma 0); "
            "use a schedule with noise there (eta above 0), or leave that step to first order"
        )
    theta = theta.detach().requires_grad_()
    latent = trajectory.latents[sub_chain[0]]
    for k in sub_chain[:-1]:
        latent = sampler.step(theta, k, latent, trajectory.noise[k], trajectory.conditioning)
    mean = sampler.mean(theta, last, latent, trajectory.conditioning)
    score = trajectory.noise[last] / sigma  # d log p(x_next | x) / d mean
    per_chain = (mean * score).flatten(1).sum(1)  # densities sum over C, H, W
    (gradient,) = torch.autograd.grad((advantage * per_chain).mean(), theta)
    return gradient


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:  # [B], [B] -> [B]
    """Each chain's reward minus the mean reward of the others of its group.

    The baseline never uses a chain's own reward, so half order stays unbiased (a group mean that included it would
    scale the term by 1 - 1/m). Raises UserError if a chain is alone in its group.
    """
    same = groups[:, None] == groups[None, :]  # [B, B]
    others = same.sum(1) - 1
    if bool((others == 0).any()):
        raise UserError(
            "leave-one-out needs at least 2 chains in every group, found a group with 1; run more chains of every "
            "prompt, or put all chains in one group"
        )
    return rewards - ((same.to(rewards.dtype) @ rewards) - rewards) / others
