"""A diffusers scheduler's configuration as a Schedule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule
from rlr_ray.errors import UserError

logger = logging.getLogger(__name__)


def ddim_scheduler(config: Any, timestep_spacing: str) -> DDIMScheduler:
    """DDIM on the noise levels of any scheduler's config. Latents are never clipped, as in diffusers' own pipelines."""
    return DDIMScheduler.from_config(
        config, timestep_spacing=timestep_spacing, clip_sample=False, thresholding=False, rescale_betas_zero_snr=False
    )


def schedule_of(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule:
    """The steps that `scheduler.set_timesteps(steps)` and `scheduler.step(..., eta=eta)` would take."""
    scheduler.set_timesteps(steps)
    if scheduler.config.timestep_spacing == "leading":
        logger.warning(
            "timestep_spacing 'leading' makes the last step nearly the identity, so first order on it is nearly dead; "
            "sampler.timestep_spacing: trailing avoids that"
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


def flow_schedule_of(
    config: Any,  # a scheduler's
    sampler: Any,
    tokens: int,  # of the picture, by which dynamic shifting goes
    sigmas: Sequence[float] | None = None,  # [T] before shifting; None: the scheduler's own
) -> Schedule:
    """The steps that FlowMatchEulerDiscreteScheduler of that config takes, with the noise of `sampler.eta`.

    Raises UserError as `check_flow`.
    """
    check_flow(config, sampler)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sampler.steps, sigmas=sigmas, mu=shift if scheduler.config.use_dynamic_shifting else None)
    return flow_schedule(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), noise_level=sampler.eta)


def own_flow_schedule(scheduler: Any, sampler: Any) -> Schedule:
    """The steps at the times that the scheduler's own `set_timesteps(steps)` gives, with the noise of `sampler.eta`.

    Raises UserError for what is no flow from noise to picture, or takes more than the number of steps.
    """
    check_flow(scheduler.config, sampler)
    config, flows = scheduler.config, isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if isinstance(scheduler, UniPCMultistepScheduler):
        flows = config.use_flow_sigmas and config.prediction_type == "flow_prediction"
    if not flows or config.use_dynamic_shifting:
        raise UserError(
            f"this pipeline's scheduler is a {type(scheduler).__name__}; allowed: FlowMatchEulerDiscreteScheduler, or "
            "UniPCMultistepScheduler with use_flow_sigmas and prediction_type flow_prediction, neither with "
            "use_dynamic_shifting; save the pipeline with one of these"
        )
    scheduler.set_timesteps(sampler.steps)
    return flow_schedule(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), noise_level=sampler.eta)


def check_flow(config: Any, sampler: Any) -> None:
    """Raise UserError for timestep spacings, which flow models do not have, and for flows that run from 0 to 1."""
    if sampler.timestep_spacing != "trailing":
        raise UserError(
            f"sampler.timestep_spacing is {sampler.timestep_spacing!r}, but a flow model's times are its scheduler's; "
            "leave the key out"
        )
    if config.get("invert_sigmas"):
        raise UserError("this pipeline's scheduler has invert_sigmas; allowed: flows whose noise is at time 1")
