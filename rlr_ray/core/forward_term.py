"""The forward term: a denoising loss towards the chains' own last latents, weighted by how good they were.

B chains, K draws a chain, C H W latent, P trained numbers; c = schedule.clean: clean latent = c_x x + c_o output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from rlr_ray.core.sampler import Conditioning, Sampler
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import generator
from rlr_ray.errors import UserError

Weighting = Literal["uniform", "elbo", "velocity"]


def forward_term(
    sampler: Sampler,
    theta: Tensor,  # [P], or [B, P] for each chain's own
    latents: Tensor,  # [B, C, H, W] the chains' own last ones
    conditioning: Conditioning,
    advantage: Tensor,  # [B], or of each draw [B, K]
    steps: Tensor,  # [B, K]
    noise: Tensor,  # [K, B, C, H, W] drawn afresh: not the chains'
    *,
    weighting: Weighting = "uniform",
    scale: float = 1.0,
    pull: float = 0.0,
    reference: Tensor | None = None,  # [P] what the pull is towards
) -> Tensor:  # [P], upwards
    """Gradient that makes good chains' last latents likelier: minus that of the mean over chains of

        scale sum_i w(k_i) (A |output - o*|^2 + pull |output - output at the reference|^2) / 2

    at noised last latents x = signal x_0 + noise e, where o* = (x_0 - c_x x) / c_o is what the model should have put
    out, whatever its prediction type. `scale` = (steps in the range) / K makes the draws stand for the sum over the
    range. The weights w make squared errors those of the noise e (`uniform`), of v or a flow's velocity (`velocity`),
    or (SNR of step k + 1 - SNR of step k) times those of x_0 (`elbo`: Kingma et al. 2021, arXiv:2107.00630, equation
    14, whose sum over all steps bounds -log p(x_0)). `uniform` and `elbo` are the same for every prediction type.

    Needs the last latent, prompt and reward only; any solver, any eta. Costs K forwards and backwards a chain, K more
    forwards with a pull; keeps the activations of one step's rows at a time, at most B if a chain's steps differ.

    Biased: a denoising loss is only a bound of log p, and fresh noise is not the chain's. On the toy chain's 6 steps
    its expectation has cosine .81 +- .02 and length .44 +- .01 of grad E[R] (uniform), .88 +- .01 and 38 +- 1 (elbo;
    nearly all of it the last step's), .72 +- .08 and 4.8 +- .2 (velocity). Fails without centring: at advantage 1 its
    mean is 1.5 |g| there, a pull to a model that predicts its own samples' noise, so a baseline that is off by .5
    halves the cosine. Centre the advantage in the whole batch.
    """
    _check(sampler.schedule, pull, reference)
    theta = theta.detach().requires_grad_()
    advantages = advantage[:, None].expand_as(steps) if advantage.ndim == 1 else advantage
    gradient = torch.zeros_like(theta)
    for k in steps.unique().tolist():
        assert k < sampler.trained, f"step {k} is the base model's: training it changes no chain"
        chain, draw = (steps == k).nonzero(as_tuple=True)  # each [rows]
        clean, fresh = latents[chain], noise[draw, chain]
        prompts = {name: value[chain] for name, value in conditioning.items()}
        noised = sampler.schedule.signal[k] * clean + sampler.schedule.noise[k] * fresh
        timestep, (of_latent, of_output) = sampler.schedule.timesteps[k], sampler.schedule.clean[k]
        output = sampler.denoiser(theta if theta.ndim == 1 else theta[chain], noised, timestep, prompts)
        loss = advantages[chain, draw] * _square(output - (clean - of_latent * noised) / of_output)
        if reference is not None and pull:
            with torch.no_grad():
                before = sampler.denoiser(reference, noised, timestep, prompts)
            loss = loss + pull * _square(output - before)
        (slope,) = torch.autograd.grad(loss.sum(), theta)
        gradient.add_(slope, alpha=-output_weight(sampler.schedule, k, weighting) / 2)
    return gradient.mul_(scale / len(latents))


def output_weight(schedule: Schedule, k: int, weighting: Weighting) -> float:
    """Factor of the squared error of step k's model output. Raises UserError for a weighting that does not exist.

    An error of the clean latent is c_o times the output's, and times signal / noise that of the noise e, and over noise
    that of v = signal e - noise x_0 (signal^2 + noise^2 = 1) or e - x_0 (signal + noise = 1).
    """
    signal, noise, of_output = schedule.signal[k], schedule.noise[k], schedule.clean[k][1]
    if weighting == "uniform":
        return (of_output * signal / noise) ** 2
    if weighting == "velocity":
        return (of_output / noise) ** 2
    if weighting != "elbo":
        raise UserError(f"`weighting` is {weighting!r}; allowed: {', '.join(get_args(Weighting))}")
    after, left = schedule.end if k + 1 == len(schedule) else (schedule.signal[k + 1], schedule.noise[k + 1])
    if not left:
        raise UserError(
            f"step {k} ends without noise, so its elbo weight is infinite; lower the upper end of `signal`, or set "
            "`weighting` to uniform or velocity"
        )
    return of_output**2 * ((after / left) ** 2 - (signal / noise) ** 2)


def forward_steps(schedule: Schedule, low: float, high: float, *, stop: int | None = None) -> tuple[int, ...]:
    """The steps before `stop` whose signal level alpha-bar lies in [low, high]; else the nearest one."""
    levels = schedule.alpha_bar[:stop]
    inside = tuple(k for k, level in enumerate(levels) if low <= level <= high)
    return inside or (min(range(len(levels)), key=lambda k: max(low - levels[k], levels[k] - high)),)


def forward_draws(
    steps: Sequence[int],
    draws: int,  # K
    shape: Sequence[int],  # C, H, W
    seeds: Sequence[Sequence[int | str]],  # [B]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # steps [B, K], noise [K, B, C, H, W]
    """Each chain's steps, drawn without replacement while there are others, and its noises; by its seed, on the CPU."""
    rounds, drawn, noises = math.ceil(draws / len(steps)), [], []
    for seed in seeds:
        source = generator(*seed)
        drawn.append(torch.cat([torch.randperm(len(steps), generator=source) for _ in range(rounds)])[:draws])
        noises.append(torch.randn(draws, *shape, generator=source, dtype=dtype))
    return torch.tensor(steps)[torch.stack(drawn)], torch.stack(noises, dim=1)


def _square(error: Tensor) -> Tensor:  # [B, C, H, W] -> [B]
    return error.flatten(1).square().sum(1)


def _check(schedule: Schedule, pull: float, reference: Tensor | None) -> None:
    if not (schedule.signal and schedule.noise and schedule.clean):
        raise UserError(
            "this model's schedule does not say the signal and noise of a step's input, so the forward term cannot "
            "noise a latent; give Schedule its `clean`, `signal` and `noise`, or use ddim_schedule or flow_schedule"
        )
    assert not pull or reference is not None, "a pull needs what it is towards"
