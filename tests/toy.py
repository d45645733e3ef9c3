"""Truths about the laboratory's toy chain, by other ways than the estimators take."""

from __future__ import annotations

from collections.abc import Collection

import numpy
import torch
from torch import Tensor

from rlr_ray.core.sampler import Chains, Trajectory
from rlr_ray.lab.toy import toy_sampler, toy_theta


def toy_trajectory(chains: Chains, stop: int | None = None) -> Trajectory:
    return toy_sampler().sample(toy_theta(), *chains.start, stop=stop)


def exact_gradient(chains: Chains, steps: Collection[int]) -> Tensor:  # [B, P]
    """Each chain's part of grad R that passes through theta at `steps`: backpropagation through the whole chain."""
    theta = toy_theta().expand(len(chains.x_start), -1).clone().requires_grad_()  # a copy a chain: gradients apart
    sampler, latent = toy_sampler(len(chains.noise)), chains.x_start
    for k in range(len(sampler)):
        theta_k = theta if k in steps else theta.detach()
        latent = sampler.step(theta_k, k, latent, chains.noise[k], {})
    (gradient,) = torch.autograd.grad(chains.objective(latent).sum(), theta)
    return gradient


def per_chain_theta(chains: Chains) -> Tensor:  # [B, P]
    """Theta repeated: with it a term's mean over chains comes apart into each chain's own estimate / B."""
    return toy_theta().expand(len(chains.x_start), -1).clone()


def worst_z(estimates: Tensor, exact: Tensor) -> float:  # [B, P], [B, P]
    """Largest |z| of the estimates' mean against the exact gradient's of the same chains, paired.

    Along the exact gradient and along each coordinate: other directions, and other code, than the certificate's.
    """
    along = numpy.column_stack([(estimates - exact) @ exact.mean(0), estimates - exact])  # [B, 1 + P]
    return float(abs(along.mean(0) / (along.std(0, ddof=1) / len(along) ** 0.5)).max())
