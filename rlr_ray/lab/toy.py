"""A toy chain in float64 whose exact gradient is cheap: the truth that the estimators are measured against.

B chains of T steps on a latent [B, 2, 1, 1]; P = 18 trained numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from rlr_ray.core.forward_term import forward_draws
from rlr_ray.core.sampler import Chains, Conditioning, Sampler
from rlr_ray.core.schedule import Schedule
from rlr_ray.models.schedulers import schedule_of

HIDDEN = 3
PARAMETERS = 6 * HIDDEN
STEPS = 6
SCHEDULER = DDIMScheduler(  # Stable Diffusion's noise levels; the last step's sigma is 0.029
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    timestep_spacing="trailing",
)


def toy_denoiser(theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
    """A small network beside the right answer for standard normal data; theta [P], or [B, P] for each chain's own."""
    weights = theta.expand(len(latent), PARAMETERS).unflatten(1, (6, HIDDEN))  # [B, 6, hidden]
    x = latent.flatten(1)  # [B, 2]
    hidden = torch.tanh(
        x[:, :1] * weights[:, 0] + x[:, 1:] * weights[:, 1] + weights[:, 2] + timestep / 1000 * weights[:, 3]
    )
    noise_share = (1 - SCHEDULER.alphas_cumprod[int(timestep)].double()).sqrt()
    return (hidden[:, None] * weights[:, 4:]).sum(-1).view_as(latent) + noise_share * latent


def toy_theta() -> Tensor:  # [P]
    return 0.5 * torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def toy_schedule(steps: int = STEPS, eta: float = 1.0) -> Schedule:
    return schedule_of(SCHEDULER, steps, eta)


def toy_sampler(steps: int = STEPS, eta: float = 1.0) -> Sampler:
    return Sampler(toy_denoiser, toy_schedule(steps, eta))


def toy_reward(latent: Tensor) -> Tensor:  # [B]
    x, y = latent.flatten(1).unbind(1)
    return torch.sin(1.5 * x) + 0.4 * y - 0.1 * (x**2 + y**2) + 0.3 * torch.cos(x * y)


def toy_chains(count: int, seed: int, steps: int = STEPS) -> Chains:
    source = torch.Generator().manual_seed(seed)
    start = torch.randn(count, 2, 1, 1, generator=source, dtype=torch.float64)
    noise = torch.randn(steps, count, 2, 1, 1, generator=source, dtype=torch.float64)

    def draws(among: Sequence[int], number: int) -> tuple[Tensor, Tensor]:  # [B, K], [K, B, 2, 1, 1]
        return forward_draws(among, number, (2, 1, 1), [("toy", seed, i) for i in range(count)], torch.float64)

    return Chains(start, noise, {}, toy_reward, draws=draws)
