"""A diffusers scheduler's configuration as a Schedule."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule
from rlr_ray.errors import UserError

logger = logging.getLogger(__name__)
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def ddim_scheduler(config: Any, timestep_spacing: str) -> DDIMScheduler:
    """DDIM on the table of betas of any scheduler's config. Latents are never clipped.

    Raises UserError for a table that DDIM has not.
    """
    betas = config.get("beta_schedule", "linear")
    if betas not in _BETAS and config.get("trained_betas") is None:
        raise UserError(
            f"this pipeline's scheduler has beta_schedule {betas!r}; allowed: {', '.join(_BETAS)}; save the pipeline "
            "with trained_betas in place of it, the same numbers one by one"
        )
    kept = {"timestep_spacing": timestep_spacing, "clip_sample": False, "thresholding": False}
    return DDIMScheduler.from_config(config, **kept)


def schedule_of(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule:
    """The steps that `scheduler.set_timesteps(steps)` and `scheduler.step(..., eta=eta)` would take."""
    set_timesteps(scheduler, steps)
    if scheduler.config.timestep_spacing == "leading":
        logger.warning(
            "timestep_spacing 'leading' makes the last step nearly the identity, so first order on it is nearly dead; "
            "sampler.timestep_spacing: trailing avoids that"
        )
    return ddim_steps(scheduler, scheduler.timesteps.tolist(), eta)


def ddim_steps(scheduler: DDIMScheduler, timesteps: Sequence[float], eta: float) -> Schedule:
    """DDIM's steps at these of the times that were set. Raises UserError for noise predicted where nothing else is."""
    alphas, kind = scheduler.alphas_cumprod.double().tolist(), scheduler.config.prediction_type
    stride, final = scheduler.config.num_train_timesteps // scheduler.num_inference_steps, scheduler.final_alpha_cumprod
    whole = [int(time) for time in timesteps]
    if kind == "epsilon" and min(alphas[time] for time in whole) <= 0:
        raise UserError(
            "this pipeline's scheduler has rescale_betas_zero_snr and prediction_type epsilon: at its first step there "
            "is nothing but noise, of which predicted noise says nothing; allowed with it: v_prediction or sample"
        )
    after = [alphas[time - stride] if time >= stride else float(final) for time in whole]
    return ddim_schedule(timesteps, [alphas[time] for time in whole], after, eta=eta, prediction_type=kind)


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Raises UserError for more steps than the scheduler's table has."""
    if steps > (trained := scheduler.config.num_train_timesteps):
        raise UserError(f"sampler.steps is {steps}; allowed: up to {trained}, which this pipeline was trained on")
    scheduler.set_timesteps(steps)


def flow_schedule_of(
    scheduler: Any,
    sampler: Any,
    tokens: int,  # of the picture, by which dynamic shifting goes
    sigmas: Sequence[float] | None = None,  # [T] before shifting; None: the scheduler's own
) -> Schedule:
    """The steps that a FlowMatchEulerDiscreteScheduler takes, with the noise of `sampler.eta`.

    Raises UserError as `check_flow`, and for another scheduler.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise UserError(
            f"this pipeline's scheduler is a {type(scheduler).__name__}; allowed for this model.name: "
            "FlowMatchEulerDiscreteScheduler; set model.name: pipeline, which takes others, or save it with one"
        )
    check_flow(scheduler.config, sampler)
    scheduler = copy.deepcopy(scheduler)
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
