"""A diffusers scheduler's configuration as a Schedule."""

from __future__ import annotations

import warnings
from typing import Any

from diffusers import DDIMScheduler

from rlr_ray.core.schedule import Schedule, ddim_schedule


def ddim_scheduler(config: Any, timestep_spacing: str) -> DDIMScheduler:
    """DDIM on the noise levels of any scheduler's config. Latents are never clipped, as in diffusers' own pipelines."""
    return DDIMScheduler.from_config(
        config, timestep_spacing=timestep_spacing, clip_sample=False, thresholding=False, rescale_betas_zero_snr=False
    )


def schedule_of(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule:
    """The steps that `scheduler.set_timesteps(steps)` and `scheduler.step(..., eta=eta)` would take."""
    scheduler.set_timesteps(steps)
    if scheduler.config.timestep_spacing == "leading":
        warnings.warn(
            "timestep_spacing 'leading' makes the last step nearly the identity, so first order on it is nearly dead; "
            "sampler.timestep_spacing: trailing avoids that",
            stacklevel=2,
        )
    timesteps = scheduler.timesteps.tolist()
    alphas = scheduler.alphas_cumprod.double().tolist()
    stride = scheduler.config.num_train_timesteps // steps
    final = float(scheduler.final_alpha_cumprod)
    return ddim_schedule(
        timesteps,
        [alphas[t] for t in timesteps],
        [alphas[t - stride] if t >= stride else final for t in timesteps],
        eta=eta,
        prediction_type=scheduler.config.prediction_type,
    )
