"""The schedule against diffusers' own DDIMScheduler.step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from rlr_ray.core.schedule import ddim_schedule
from rlr_ray.models.schedulers import ddim_scheduler, schedule_of

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps", [7, 10, 50])
@pytest.mark.filterwarnings("ignore:timestep_spacing 'leading'")
def test_every_step_agrees(eta: float, prediction_type: str, spacing: str, set_alpha_to_one: bool, steps: int) -> None:
    scheduler = DDIMScheduler(
        **SD, prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one
    )
    schedule = schedule_of(scheduler, steps, eta)
    source = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latent, output, noise = torch.randn(3, 2, 4, 3, 3, generator=source, dtype=torch.float64)
        expected = scheduler.step(output, timestep, latent, eta=eta, variance_noise=noise).prev_sample
        found = schedule.mean(k, latent, output) + schedule.sigma[k] * noise
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6)  # its alphas are float32


def test_the_last_step_has_the_noise_that_the_scheduler_gives_it() -> None:
    """Trailing spacing: none if the chain ends at alpha 1; else nearly sqrt(1 - a') = 0.029 for Stable Diffusion."""
    ends = [
        schedule_of(ddim_scheduler(DDIMScheduler(**SD, set_alpha_to_one=one).config, "trailing"), 10, 1.0).sigma[-1]
        for one in (True, False)
    ]
    assert ends[0] == 0
    assert ends[1] == pytest.approx(0.00085**0.5, rel=0.01)


def test_leading_spacing_warns_and_an_unknown_prediction_is_refused() -> None:
    with pytest.warns(UserWarning, match="nearly the identity"):
        schedule_of(DDIMScheduler(**SD, timestep_spacing="leading"), 10, 1.0)
    with pytest.raises(ValueError, match="'flow'; allowed: epsilon, v_prediction, sample"):
        ddim_schedule([1], [0.5], [0.6], eta=1.0, prediction_type="flow")
