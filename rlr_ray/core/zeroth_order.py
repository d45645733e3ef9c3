"""Zeroth order: parameter perturbations, and nothing of the chain but its reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler
from rlr_ray.core.seeds import normal
from rlr_ray.core.weighting import TermEstimate, cut_at, term_estimate

_BLOCK = 2**14  # numbers of every row that are worked on at once


@dataclass(frozen=True)
class Directions:
    """The law of perturbations: evenly over a sphere in R^P (isotropic), or in the span of a few vectors (guided).

    A direction has length sqrt(dimensions), so that E u u^T is the identity on its span. Normal numbers would do that
    too, but their length varies, which in k dimensions costs a factor (k + 2) / k of variance.
    `scale` is the standard deviation of a trained number's displacement when directions are isotropic; guided ones
    are lengthened by sqrt(P / k) so that theta moves as far in k dimensions as it would in all P.
    """

    parameters: int  # P
    scale: float
    basis: Tensor | None = None  # [k, P] orthonormal rows; None: isotropic

    @property
    def dimensions(self) -> int:
        return self.parameters if self.basis is None else len(self.basis)

    @property
    def step_size(self) -> float:
        """Factor of a direction before it is added to theta."""
        return self.scale * math.sqrt(self.parameters / self.dimensions)

    def coordinates(self, seed: Sequence[int | str], dtype: torch.dtype) -> Tensor:  # [k], or [P] if isotropic
        numbers = normal((self.dimensions,), dtype, *seed)
        return numbers * (math.sqrt(self.dimensions) / numbers.norm())

    def lift(self, coordinates: Tensor) -> Tensor:  # [..., k] -> [..., P]
        return coordinates if self.basis is None else coordinates @ self.basis

    def draw(self, seed: Sequence[int | str], dtype: torch.dtype) -> Tensor:  # [P]
        """The direction that `seed` names."""
        return self.lift(self.coordinates(seed, dtype))


@dataclass(frozen=True)
class RolloutResult:
    """Rewards of a chunk of perturbations; everything else about them follows from their indices.

    Plain numbers: packing a few of them as a tensor, to send it, takes ten times as long.
    """

    indices: range  # [n]
    rewards_plus: list[float]  # [n]
    rewards_minus: list[float]  # [n]
    invalid: int = 0  # rewards that were not finite and replaced
    reward_s: float = field(default=0.0, compare=False)  # spent in rewards


def rollout(
    sampler: Sampler,
    theta: Tensor,  # [P]
    plan: Plan,
    chains: Chains,  # one chain a direction, B = n
    directions: Tensor,  # [n, P]
    step_size: float,
) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Rewards (residuals) of each chain with its own direction added to, then taken from, theta at zeroth-order steps.

    Both signs run in one batch, from the same start and with the same noises; up to the first perturbed step they are
    the same chain.
    """
    first, conditioning = plan.zeroth_order[0], chains.conditioning
    both = {name: torch.cat([value, value]) for name, value in conditioning.items()}
    with torch.no_grad():
        begun = sampler.sample(theta, *chains.start, stop=first)
        latent = torch.cat([begun.latents[-1]] * 2)
        shifted = theta + torch.cat([step_size * directions, -step_size * directions])
        for k in range(first, len(sampler)):
            theta_k = shifted if k in plan.zeroth_order else theta
            noise = torch.cat([chains.noise[k]] * 2)
            latent = sampler.step(theta_k, k, latent, noise, both)
        plus, minus = chains.residual(latent).chunk(2)
        return plus, minus


def zeroth_order(
    directions: Directions,
    seeds: Sequence[Sequence[int | str]],  # [N]
    rewards_plus: Tensor,  # [N] at theta + step_size * u
    rewards_minus: Tensor,  # [N] at theta - step_size * u, same start and noises
    dtype: torch.dtype = torch.float32,
    *,
    clip: float | None = None,
) -> TermEstimate:
    """Antithetic parameter-perturbation gradient, averaged over the directions in the order of their seeds.

    The third term of the paper's equation 6 in antithetic form: the mean of `(R+ - R-) / (2 step_size) * u`, u applied
    at the plan's zeroth-order steps only (perturbing others too would count them twice). As the scale goes to 0 its
    expectation is, for isotropic directions, the part of grad E[R] that passes through theta at those steps; for
    guided ones the projection of that part on the span, as long as the span does not depend on this step's chains.
    Its variance per direction is `dimensions * E |P g_b|^2 - |P g|^2`: g that part, g_b one chain's own gradient,
    whose mean is g, P the projection on the span; so a span of one direction is the slope along it and no more.

    `clip` cuts the differences R+ - R- at so many times their median size, of those that are not 0. Biased then: of a
    mean's few large summands, which hold most of its variance, it keeps the sign.
    """
    differences, cut = rewards_plus.double() - rewards_minus.double(), None  # [N]
    if clip is not None:
        some = differences[differences != 0].abs()
        limit = clip * float(some.median()) if len(some) else 0.0
        cut, differences = cut_at(differences.abs(), limit), differences.clamp(-limit, limit)
    coefficients = differences / (2 * directions.step_size)
    total = torch.zeros(directions.dimensions, dtype=dtype)
    squares = 0.0
    for seed, coefficient in zip(seeds, coefficients.tolist(), strict=True):
        estimate = coefficient * directions.coordinates(seed, dtype)
        total += estimate
        squares += float(estimate.double().square().sum())
    mean = directions.lift(total / len(seeds))
    return term_estimate(mean, squares / len(seeds), len(seeds), cut)


def orthonormal_span(vectors: Sequence[Tensor], tolerance: float = 1e-3) -> Tensor | None:  # [k, P] or None
    """Orthonormal rows that span the vectors [P], in their order (Gram-Schmidt in double precision).

    Left out: vectors of norm 0, and those in the span of earlier ones up to `tolerance`. None if none is left.
    """
    rows: list[Tensor] = []
    for vector in vectors:
        row = vector.double()
        norm = row.norm()
        for _ in range(2):  # twice: once leaves rounding errors when the vector is nearly in the span
            for other in rows:
                row = row - (row @ other) * other
        if norm > 0 and row.norm() > tolerance * norm:
            rows.append(row / row.norm())
    return torch.stack(rows).to(vectors[0].dtype) if rows else None


def principal_span(rows: Sequence[Tensor] | Tensor, count: int, tolerance: float = 1e-3) -> Tensor | None:
    """The `count` leading right singular vectors [k, P] of n rows [P]: no other span of that size comes closer to them.

    From the eigenvectors of the rows' Gram matrix [n, n] in double precision, a few MiB at a time. Left out: those
    whose singular value is below `tolerance` times the largest. None if none is left. The Gram matrix squares singular
    values, so the vectors are orthonormal to about 1e-16 / tolerance^2.
    """
    parts = range(0, len(rows[0]), _BLOCK)
    gram = torch.stack([block @ block.T for block in (_block(rows, first) for first in parts)]).sum(0)
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0)[:count], vectors.flip(1)[:, :count]
    vectors = vectors[:, squares > tolerance**2 * squares[0]]  # [n, k]
    if not vectors.shape[1]:
        return None
    combined = vectors / squares[: vectors.shape[1]].sqrt()
    span = rows[0].new_empty(vectors.shape[1], len(rows[0]))
    for first in parts:
        span[:, first : first + _BLOCK] = combined.T @ _block(rows, first)
    return span


def _block(rows: Sequence[Tensor] | Tensor, first: int) -> Tensor:  # [n, block]
    return torch.stack([row[first : first + _BLOCK] for row in rows]).double()
