"""Truths about the laboratory's toy chain, by other ways than the estimators take."""

from __future__ import annotations

from collections.abc import Collection

import numpy
import torch
from torch import Tensor

from rlr_ray.core.sampler import Chains, Sampler, Trajectory
from rlr_ray.lab.toy import toy_sampler, toy_theta


def toy_trajectory(chains: Chains, stop: int | None = None) -> Trajectory:
    return toy_sampler().sample(toy_theta(), *chains.start, stop=stop)


def exact_gradient(chains: Chains, steps: Collection[int], sampler: Sampler | None = None) -> Tensor:  # [B, P]
    """Each chain's part of grad R that passes through theta at `steps`: backpropagation through the whole chain."""
    theta = toy_theta().expand(len(chains.x_start), -1).clone().requires_grad_()  # a copy a chain: gradients apart
    sampler, latent = sampler or toy_sampler(len(chains.noise)), chains.x_start
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


def beside_the_gradient(estimates: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:  # [B, P] each; [2] each
    """(Cosine, length) of the estimates' mean beside the exact gradient's, and their standard errors over tenths."""

    def beside(some: Tensor, truth: Tensor) -> list[float]:
        mean, right = some.mean(0), truth.mean(0)
        return [float(torch.cosine_similarity(mean, right, 0)), float(mean.norm() / right.norm())]

    tenths = torch.tensor([beside(*pair) for pair in zip(estimates.chunk(10), exact.chunk(10), strict=True)])
    return torch.tensor(beside(estimates, exact)), tenths.std(0) / 10**0.5
