"""First order: backpropagation of the reward through the last steps of the chain, and its mean over clipped chains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlr_ray.core.sampler import Objective, Sampler, Trajectory
from rlr_ray.core.sums import ExactMean, gathered, square_norm
from rlr_ray.core.weighting import TermEstimate, cut_at, term_estimate
from rlr_ray.errors import UserError


def first_order(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,
    objective: Objective,
    *,
    checkpoint_steps: bool = False,
    step_weights: Sequence[float] | None = None,  # [K]
    per_chain: bool = False,
) -> tuple[Tensor, Tensor, Trajectory]:  # [P], or [B, P] per chain; what the objective said; the whole chain
    """Gradient of the mean reward through every step after the trajectory's end, with what is met on the way.

    Of an objective of several parts, those without a gradient count as constants.

    The first term of the paper's equation 6, for the K steps from trajectory.stop on that are theta's. Its expectation
    is the part of grad E[R] that passes through theta at those steps. `checkpoint_steps` keeps one latent a step and
    one step's activations, for one more forward a step. `step_weights` multiply what passes through theta at each step:
    the inverse probability of reaching it, if K is drawn at random. `per_chain` gives each chain's own gradient, whose
    mean is the other, for no further forward but B P numbers. Raises UserError if the rewards carry no gradient.
    """
    theta = _leaf(theta, trajectory.latents.shape[1], per_chain)
    assert trajectory.stop < sampler.trained, f"from step {trajectory.stop} on all steps are the base model's"
    thetas = [theta] * (sampler.trained - trajectory.stop)
    if step_weights is not None:
        thetas = [_scale_gradient(theta, weight) for weight in step_weights]
    rewards, whole = _finish(sampler, thetas, trajectory, objective, checkpoint_steps)
    each = torch.atleast_2d(rewards).sum(0)
    (gradient,) = torch.autograd.grad(each.sum() if per_chain else each.mean(), theta)
    return gradient, rewards.detach(), whole


def linear_adjoint(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,  # of whole chains
    objective: Objective,
    steps: Sequence[int],
    *,
    step_weights: Sequence[float] | None = None,  # of `steps`
    per_chain: bool = False,
) -> tuple[Tensor, Tensor]:  # [P], or [B, P] per chain; what the objective said
    """First order with gradients stopped at the denoiser's input (Deep Reward Tuning, Wu et al. 2024).

    With lambda = dR/dx_T and a_j the coefficient of step j's latent in its output, the prediction held: the sum over
    `steps` of `(d mu_k / d theta at x_k)^T lambda prod_(j > k) a_j`. Of m steps drawn at random, `step_weights` are
    their inverse probabilities. Costs a forward and a backward a step, one step's activations at a time; the last step
    is exact.

    Biased: it leaves out how a step moves what later ones predict. On the toy chain its expectation has cosine
    .74 +- .02 and length 3.2 +- .1 of grad E[R] (tests/core/test_first_order.py), and trained on alone it has ended far
    below where it began. Raises UserError if the rewards carry no gradient.
    """
    last = trajectory.latents[-1].detach().requires_grad_()
    rewards = _rated(objective, last)
    (slope,) = torch.autograd.grad(torch.atleast_2d(rewards).sum(), last)  # [B, C, H, W]
    theta = _leaf(theta, len(last), per_chain)
    gradient = torch.zeros_like(theta)
    for k, weight in zip(steps, [1.0] * len(steps) if step_weights is None else step_weights, strict=True):
        assert k < sampler.trained, f"step {k} is the base model's: first order there has no gradient"
        mean = sampler.mean(theta, k, trajectory.at(k), trajectory.conditioning)
        carried = math.prod(sampler.schedule.latent_coefficient[k + 1 :])
        (through,) = torch.autograd.grad(mean, theta, slope)
        gradient.add_(through, alpha=weight * carried / (1 if per_chain else len(last)))
    return gradient, rewards.detach()


def step_gradients(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,
    objective: Objective,
) -> tuple[Tensor, Tensor]:  # [K, P], rewards [B]
    """First order taken apart: the gradient of the mean reward through theta at each step alone, checkpointed.

    The exact answer that any estimate of these steps is compared with.
    """
    count = sampler.trained - trajectory.stop
    copies = theta.detach().expand(count, *theta.shape).clone().requires_grad_()
    rewards, _ = _finish(sampler, list(copies.unbind()), trajectory, objective, True)
    (gradients,) = torch.autograd.grad(rewards.mean(), copies)
    return gradients, rewards.detach()


class ClippedMean:
    """Mean over an update's chains of their gradients G_b, each cut to at most `clip` times their median norm:

        G_b <- G_b min(1, clip median |G| / |G_b|),

    the median over all chains that have a gradient. Few chains hold most of the variance, so it cuts the noise scale by
    an order of magnitude. Biased: it is the gradient of no objective. A nan or an infinity makes the mean nan.

    With a `reference` (the running median of earlier updates) a chunk is scaled by it and added at once, and only norms
    are kept; without one all gradients are, till the median is known: B P numbers. Sums are those of `mean`, so neither
    order nor share of the work changes a bit.
    """

    def __init__(self, mean: ExactMean, clip: float, *, reference: float | None = None):
        self.mean, self.clip, self.reference = mean, clip, reference
        self.norms: dict[int, Tensor] = {}  # chunk -> [b]
        self.waiting: dict[int, Tensor] = {}  # chunk -> [b, P]

    def add(self, chunk: int, gradients: Tensor) -> None:  # [b, P], overwritten
        norms = [math.sqrt(square_norm(gradient)) for gradient in gradients]
        self.norms[chunk] = torch.tensor(norms, dtype=torch.float64, device=gradients.device)
        if self.reference is None:
            self.waiting[chunk] = gradients
        else:
            self._add_scaled(chunk, gradients, self.clip * self.reference)

    def take(self, chunks: int) -> tuple[TermEstimate, float]:
        """The mean over all chunks that the processes added, and the median of chains' norms before they were cut."""
        norms = gathered(self.norms, chunks, self.mean.reduce).flatten()  # [B]
        some = norms[norms > 0]
        median = float(some.median()) if len(some) else 0.0
        limit = self.clip * (median if self.reference is None else self.reference)
        for chunk in list(self.waiting):
            self._add_scaled(chunk, self.waiting.pop(chunk), limit)
        gradient, _ = self.mean.take(range(chunks))
        mean_square = float(norms.clamp(max=limit).square().mean())
        return term_estimate(gradient, mean_square, len(norms), cut_at(norms, limit)), median

    def _add_scaled(self, chunk: int, gradients: Tensor, limit: float) -> None:
        factors = (limit / self.norms[chunk].clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        total, *others = gradients.mul_(factors[:, None].to(gradients.dtype))
        for gradient in others:  # in order, so that no bit depends on how a sum is cut in threads
            total += gradient
        self.mean.add(chunk, total.div_(len(gradients)))


def _finish(
    sampler: Sampler,
    thetas: Sequence[Tensor],  # [K] of [P]
    trajectory: Trajectory,
    objective: Objective,
    checkpoint_steps: bool,
) -> tuple[Tensor, Trajectory]:  # rewards [B] with their graph, the whole chain without
    """Run the steps after the trajectory's end with gradients, theta's and the base model's; rate the last latent.

    Raises UserError if the rewards carry no gradient.
    """
    latents = [trajectory.latents[-1]]
    passed = [*thetas, *[thetas[-1]] * sampler.off]
    for theta, k in zip(passed, range(trajectory.stop, len(sampler)), strict=True):
        arguments = (theta, k, latents[-1], trajectory.noise[k], trajectory.conditioning)
        if checkpoint_steps:
            latents.append(checkpoint(sampler.step, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            latents.append(sampler.step(*arguments))
    rewards = _rated(objective, latents[-1])
    whole = torch.cat([trajectory.latents[:-1], torch.stack([latent.detach() for latent in latents])])
    steps = None if trajectory.steps is None else (*trajectory.steps[:-1], *range(trajectory.stop, len(sampler) + 1))
    return rewards, replace(trajectory, latents=whole, steps=steps)


def _rated(objective: Objective, latent: Tensor) -> Tensor:
    rewards = objective(latent)
    if not rewards.requires_grad:
        raise UserError(
            "the reward carries no gradient, so first order cannot pass through it; "
            "compute it with torch operations outside torch.no_grad(), or use no first-order steps"
        )
    return rewards


def _leaf(theta: Tensor, chains: int, per_chain: bool) -> Tensor:  # [P], or [B, P] of one storage
    return (theta.detach().expand(chains, -1) if per_chain else theta.detach()).requires_grad_()


def _scale_gradient(theta: Tensor, factor: float) -> Tensor:
    """Theta itself, whose gradient is multiplied; no copy of it."""
    same = theta.view_as(theta)
    same.register_hook(lambda gradient: factor * gradient)
    return same
