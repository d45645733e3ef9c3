"""A diffusers scheduler as a Schedule: a linear step with Gaussian noise, at the times that its pipeline asks it for.

s is a noise level: x = x0 + s e, or of flows x = (1 - s) x0 + s e. What a scheduler's configuration says that these
steps do not do is refused.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, LCMScheduler

from rlr_ray.core.schedule import Schedule, _clean_and_noise, ddim_schedule, flow_schedule
from rlr_ray.errors import UserError

logger = logging.getLogger(__name__)
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Schedulers on a table of cumulative alphas, whose own solver gives way to DDIM's steps.
_ON_ALPHAS = {
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "SASolverScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "TCDScheduler"),
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
}
# What spaces a scheduler's times otherwise than its table does.
_SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def kind_of(scheduler: Any) -> str:
    """The name of the steps that a scheduler gets: flow, edm, sigmas, lcm or ddim. Raises UserError if there are none.

    flow: x = (1 - s) x0 + s e, the model says e - x0. sigmas: Euler's x = x0 + s e at noise levels of its own. edm: the
    same, the data's deviation not 1. lcm: latent consistency. ddim: all on a table of cumulative alphas.
    """
    name, config = type(scheduler).__name__, scheduler.config
    own = config.get("use_karras_sigmas") or config.get("timestep_type") == "continuous"
    kind = {"FlowMatchEulerDiscreteScheduler": "flow", "EDMEulerScheduler": "edm", "LCMScheduler": "lcm"}.get(name)
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        kind = "flow"
    elif name == "EulerDiscreteScheduler" and own:
        kind = "sigmas"
    elif kind is None and name in _ON_ALPHAS and not config.get("use_flow_sigmas"):
        kind = "ddim"
    if kind is None:
        raise UserError(
            f"this pipeline's scheduler is a {name}, for which no step is known that is linear in the latent with "
            "Gaussian noise; allowed: flow matching's Euler, UniPC and DPM-Solver with use_flow_sigmas, EDM's and "
            "Karras's Euler, LCM, and those on a table of betas; save the pipeline with one of these"
        )
    _refuse(name, config, kind)
    return kind


def _refuse(name: str, config: Any, kind: str) -> None:
    refused = {
        "flow": ["invert_sigmas", "stochastic_sampling", "thresholding"],
        "edm": [],
        "sigmas": ["use_exponential_sigmas", "use_beta_sigmas", "interpolation_type"],
        "lcm": ["thresholding", "clip_sample", "rescale_betas_zero_snr"],
        "ddim": ["thresholding", "clip_sample", *_SPACED],
    }[kind]
    said = [key for key in refused if config.get(key)]
    said = [key for key in said if not (key == "interpolation_type" and config[key] == "linear")]
    if said:
        raise UserError(
            f"this pipeline's scheduler, a {name}, has {', '.join(f'{key}: {config[key]}' for key in said)}, which the "
            "chain's steps do not do; save the pipeline with a scheduler without it"
        )


def solver_of(scheduler: Any, timestep_spacing: str) -> Any:
    """A scheduler of our own for a pipeline's call: its own, or DDIM on the table of one that steps otherwise.

    Raises UserError for a timestep spacing where the pipeline's own times stay.
    """
    if kind_of(scheduler) == "ddim" and not isinstance(scheduler, CogVideoXDDIMScheduler):
        return ddim_scheduler(scheduler.config, timestep_spacing)
    if timestep_spacing != "trailing":
        raise UserError(
            f"sampler.timestep_spacing is {timestep_spacing!r}, but this pipeline's times are its "
            f"{type(scheduler).__name__}'s; leave the key out"
        )
    return copy.deepcopy(scheduler)


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


def steps_of(
    scheduler: Any,
    timesteps: Sequence[float],  # [T] that a call stepped through
    eta: float | Sequence[float],  # of all, or [T]
) -> Schedule:
    """The steps at these of the scheduler's times; a call on a picture leaves out the first.

    Raises UserError for steps that are not one after the other, or of which two are at one time.
    """
    own = [float(time) for time in scheduler.timesteps]
    begin = own.index(timesteps[0]) if timesteps and timesteps[0] in own else len(own)
    if own[begin : begin + len(timesteps)] != list(timesteps) or len(set(timesteps)) != len(timesteps):
        raise UserError(
            f"this pipeline steps through the times {_short(timesteps)} of its scheduler's {_short(own)}; allowed: "
            "each once, one after the other"
        )
    steps = {"flow": _flow, "edm": _euler, "sigmas": _euler, "lcm": _consistency, "ddim": _ddim}[kind_of(scheduler)]
    return steps(scheduler, timesteps, begin, _of_each(eta, len(timesteps)))


def _of_each(eta: float | Sequence[float], steps: int) -> Sequence[float]:  # [T]
    return eta if isinstance(eta, Sequence) else [eta] * steps


def _short(times: Sequence[float]) -> str:
    shown = ", ".join(f"{time:g}" for time in times[:4])
    return f"[{shown}{', ...' if len(times) > 4 else ''}]"


def _flow(scheduler: Any, timesteps: Sequence[float], begin: int, etas: Sequence[float]) -> Schedule:
    sigmas = scheduler.sigmas[begin : begin + len(timesteps) + 1].tolist()
    return flow_schedule(timesteps, sigmas, noise_level=etas)


def schedule_of(scheduler: DDIMScheduler, steps: int, eta: float | Sequence[float]) -> Schedule:
    """The steps that `scheduler.set_timesteps(steps)` and `scheduler.step(..., eta=eta)` would take."""
    scheduler.set_timesteps(steps)
    return _ddim(scheduler, scheduler.timesteps.tolist(), 0, _of_each(eta, steps))


def _ddim(scheduler: Any, timesteps: Sequence[float], begin: int, etas: Sequence[float]) -> Schedule:
    """Raises UserError for noise that is predicted where nothing else is."""
    if scheduler.config.timestep_spacing == "leading":
        logger.warning(
            "timestep_spacing 'leading' makes the last step nearly the identity, so first order on it is nearly dead; "
            "sampler.timestep_spacing: trailing avoids that"
        )
    alphas, kind = scheduler.alphas_cumprod.double().tolist(), scheduler.config.prediction_type
    stride, final = scheduler.config.num_train_timesteps // scheduler.num_inference_steps, scheduler.final_alpha_cumprod
    whole = [int(time) for time in timesteps]
    if kind == "epsilon" and min(alphas[time] for time in whole) <= 0:
        raise UserError(
            "this pipeline's scheduler has rescale_betas_zero_snr and prediction_type epsilon: at its first step there "
            "is nothing but noise, of which predicted noise says nothing; allowed with it: v_prediction or sample"
        )
    after = [alphas[time - stride] if time >= stride else float(final) for time in whole]
    return ddim_schedule(timesteps, [alphas[time] for time in whole], after, eta=etas, prediction_type=kind)


def _euler(scheduler: Any, timesteps: Sequence[float], begin: int, etas: Sequence[float]) -> Schedule:
    """DDIM's steps of y = x / sqrt(1 + s^2), whose alpha is 1 / (1 + s^2), said of x; eta 1 is Euler ancestral.

    EDM (Karras et al. 2022, arXiv:2206.00364, equation 7) has data of deviation d, not 1: x0 = c_skip x + c_out F.
    """
    config, sigmas = scheduler.config, scheduler.sigmas[begin : begin + len(timesteps) + 1].double().tolist()
    clean = _edm_clean if type(scheduler).__name__ == "EDMEulerScheduler" else _euler_clean
    rows = []
    for (s, after), eta in zip(itertools.pairwise(sigmas), etas, strict=True):
        x, output = clean(s, config)
        up = min(after, eta * math.sqrt(after**2 * (s**2 - after**2) / s**2))
        down = math.sqrt(after**2 - up**2)
        rows.append((x + down / s * (1 - x), output * (1 - down / s), up, (x, output)))
    latent, outputs, sigma, cleans = zip(*rows, strict=True)
    signal, noise, end = (1.0,) * len(rows), tuple(sigmas[:-1]), (1.0, sigmas[-1])
    return Schedule(tuple(timesteps), latent, outputs, sigma, cleans, signal, noise, end)


def _euler_clean(s: float, config: Any) -> tuple[float, float]:
    """Weights of latent and output in the predicted clean latent."""
    return {
        "epsilon": (1.0, -s),
        "v_prediction": (1 / (s**2 + 1), -s / math.sqrt(s**2 + 1)),
        "sample": (0.0, 1.0),
    }[config.prediction_type]


def _edm_clean(s: float, config: Any) -> tuple[float, float]:
    data = config.sigma_data
    out = s * data / math.sqrt(s**2 + data**2)
    return data**2 / (s**2 + data**2), out if config.prediction_type == "epsilon" else -out


def _consistency(scheduler: LCMScheduler, timesteps: Sequence[float], begin: int, etas: Sequence[float]) -> Schedule:
    """Latent consistency models' (Luo et al. 2023, arXiv:2310.04378): a clean latent, fresh noise on all of it.

    Raises UserError for another eta than 1: there is no other noise. The last step has none.
    """
    if (other := min(etas)) != 1:
        raise UserError(f"sampler.eta is {other:g} at a step; allowed for a latent consistency model: 1, its own noise")
    alphas = [float(scheduler.alphas_cumprod[int(time)]) for time in timesteps]
    rows = []
    for time, a, after in zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True):
        skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(time))
        x, output, *_ = _clean_and_noise(a, scheduler.config.prediction_type)
        x, output = out * x + skip, out * output
        rows.append((math.sqrt(after) * x, math.sqrt(after) * output, math.sqrt(1 - after), (x, output)))
    latent, outputs, sigma, clean = zip(*rows, strict=True)
    signal = tuple(math.sqrt(a) for a in alphas)
    noise = tuple(math.sqrt(1 - a) for a in alphas)
    return Schedule(tuple(timesteps), latent, outputs, sigma, clean, signal, noise)
