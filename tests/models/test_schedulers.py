"""Schedulers' configurations: each is stepped as diffusers steps it, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from rlr_ray.errors import UserError
from rlr_ray.models.schedulers import ddim_scheduler, kind_of, schedule_of, solver_of, steps_of

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EXACT: dict[str, Any] = {  # schedulers whose own steps have no noise and are those of the chain at eta 0
    "zero terminal SNR": DDIMScheduler(
        **TABLE,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    ),
    "EDM": EDMEulerScheduler(),
    "EDM, v": EDMEulerScheduler(prediction_type="v_prediction"),
    "Karras": EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True),
    "Karras, v": EulerDiscreteScheduler(**TABLE, use_karras_sigmas=True, prediction_type="v_prediction"),
    "flow, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, Karras": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
}


@pytest.mark.parametrize("name", EXACT)
def test_without_noise_steps_are_the_schedulers_own(name: str) -> None:
    scheduler, solver = EXACT[name], solver_of(EXACT[name], "trailing")
    for one in (scheduler, solver):
        one.set_timesteps(6)
    times = [float(time) for time in scheduler.timesteps]
    schedule = steps_of(solver, times, 0.0)
    source = torch.Generator().manual_seed(0)
    latent = torch.randn(8, generator=source, dtype=torch.float64) * getattr(scheduler, "init_noise_sigma", 1.0)
    for k, time in enumerate(scheduler.timesteps):
        output = torch.randn(8, generator=source, dtype=torch.float64)
        expected = scheduler.step(output, time, latent, return_dict=False)[0]
        seen = schedule.mean(k, latent, output)
        torch.testing.assert_close(seen, expected.double(), atol=1e-5, rtol=1e-5)
        latent = expected.double()


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["EDM", "Karras, v"])
def test_noise_keeps_the_marginals(name: str, eta: float) -> None:
    """Of data that are one point, x0 = 0, a perfect model leaves noise of the next step's level."""
    solver = solver_of(EXACT[name], "trailing")
    solver.set_timesteps(6)
    schedule = steps_of(solver, [float(time) for time in solver.timesteps], eta)
    for k, (s, after) in enumerate(zip(schedule.noise, (*schedule.noise[1:], schedule.end[1]), strict=True)):
        clean_latent, clean_output = schedule.clean[k]
        output = -clean_latent * s / clean_output  # times the noise: what predicts 0
        scale = schedule.latent_coefficient[k] * s + schedule.output_coefficient[k] * output
        assert scale**2 + schedule.sigma[k] ** 2 == pytest.approx(after**2, abs=1e-9)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDIMScheduler(**TABLE), "clip_sample: True"),
        (DDIMScheduler(**TABLE, clip_sample=False, thresholding=True), "thresholding: True"),
        (DPMSolverMultistepScheduler(**TABLE, use_lu_lambdas=True), "use_lu_lambdas: True"),
        (UniPCMultistepScheduler(**TABLE, use_karras_sigmas=True), "use_karras_sigmas: True"),
        (EulerDiscreteScheduler(**TABLE, use_beta_sigmas=True), "use_beta_sigmas: True"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling: True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas: True"),
    ],
)
def test_what_the_steps_do_not_do_is_refused(scheduler: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"has {words}"):
        kind_of(scheduler)


@pytest.mark.parametrize("betas", ["sigmoid", "laplace"])
def test_tables_that_ddim_has_not_are_refused(betas: str) -> None:
    with pytest.raises(UserError, match=f"beta_schedule '{betas}'; allowed: linear"):
        ddim_scheduler(DDPMScheduler(beta_schedule=betas, clip_sample=False).config, "trailing")


def test_noise_that_is_predicted_of_noise_alone_is_refused() -> None:
    scheduler = DDIMScheduler(**TABLE, rescale_betas_zero_snr=True, clip_sample=False)
    with pytest.raises(UserError, match="rescale_betas_zero_snr and prediction_type epsilon"):
        schedule_of(ddim_scheduler(scheduler.config, "trailing"), 4, 1.0)


def test_spacings_are_refused_where_the_schedulers_own_times_stay() -> None:
    with pytest.raises(UserError, match="'leading', but this pipeline's times are its EDMEulerScheduler's; leave"):
        solver_of(EDMEulerScheduler(), "leading")
