"""The schedules against the steps of diffusers' own schedulers, and against distributions whose velocity is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from rlr_ray.config.model import SamplerConfig
from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule
from rlr_ray.models.schedulers import ddim_scheduler, schedule_of, steps_of

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


def test_each_step_has_its_own_noise() -> None:
    """As diffusers' step is told another eta each time; a flow's others are as without noise."""
    etas, scheduler = SamplerConfig(steps=6, eta=[0.2, 1, 0.5, 1, 0, 1], noisy_steps=(1, 4)).etas, DDIMScheduler(**SD)
    schedule, source = schedule_of(scheduler, 6, etas), torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latent, output, noise = torch.randn(3, 2, 4, 3, 3, generator=source, dtype=torch.float64)
        expected = scheduler.step(output, timestep, latent, eta=etas[k], variance_noise=noise).prev_sample
        ours = schedule.mean(k, latent, output) + schedule.sigma[k] * noise
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=3e-6)
    assert [k for k, sigma in enumerate(schedule.sigma) if sigma] == [1, 2, 3]
    levels = ([0.0, 0.7, 0.0], 0.0, 0.7)
    some, none, noisy = (flow_schedule(range(3), [0.9, 0.6, 0.3, 0.0], noise_level=a) for a in levels)
    for k, like in enumerate((none, noisy, none)):
        assert some.sigma[k] == like.sigma[k]
        assert some.mean(k, torch.ones(1), torch.ones(1)) == like.mean(k, torch.ones(1), torch.ones(1))


def test_the_last_step_has_the_noise_that_the_scheduler_gives_it() -> None:
    """Trailing spacing: none if the chain ends at alpha 1; else nearly sqrt(1 - a') = 0.029 for Stable Diffusion."""
    ends = [
        schedule_of(ddim_scheduler(DDIMScheduler(**SD, set_alpha_to_one=one).config, "trailing"), 10, 1.0).sigma[-1]
        for one in (True, False)
    ]
    assert ends[0] == 0
    assert ends[1] == pytest.approx(0.00085**0.5, rel=0.01)


def test_leading_spacing_warns_and_an_unknown_prediction_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    schedule_of(DDIMScheduler(**SD, timestep_spacing="leading"), 10, 1.0)
    assert "nearly the identity" in caplog.text
    with pytest.raises(ValueError, match="'flow'; allowed: epsilon, v_prediction, sample"):
        ddim_schedule([1], [0.5], [0.6], eta=1.0, prediction_type="flow")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_eta_1_is_the_ancestral_ddpm_sampler(prediction_type: str, set_alpha_to_one: bool) -> None:
    """Means and sigmas, but for the last step of a DDIM that does not end at alpha 1, as DDPM always does."""
    options = {**SD, "timestep_spacing": "trailing", "prediction_type": prediction_type}
    scheduler = DDPMScheduler(**options, variance_type="fixed_small")
    scheduler.set_timesteps(10)
    schedule = schedule_of(DDIMScheduler(**options, set_alpha_to_one=set_alpha_to_one), 10, 1.0)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    source = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps if set_alpha_to_one else scheduler.timesteps[:-1]):
        latent, output = torch.randn(2, 2, 4, 3, 3, generator=source, dtype=torch.float64)
        found = scheduler.step(output, timestep, latent, generator=torch.Generator().manual_seed(k)).prev_sample
        noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        sigma = scheduler._get_variance(timestep).sqrt().item()
        torch.testing.assert_close(schedule.mean(k, latent, output), found - sigma * noise, rtol=1e-5, atol=1e-5)
        assert schedule.sigma[k] == pytest.approx(sigma, abs=1e-5)
    assert (schedule.sigma[-1] == 0) == set_alpha_to_one


def test_eta_1_of_steps_that_do_not_divide_the_training_steps_is_nearly_ddpm() -> None:
    """DDIM goes down by 1000 // T timesteps, DDPM to the next of those asked for, which may be one further."""
    options = {**SD, "timestep_spacing": "trailing"}
    scheduler = DDPMScheduler(**options)
    scheduler.set_timesteps(30)
    schedule = schedule_of(DDIMScheduler(**options), 30, 1.0)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    expected = torch.tensor([scheduler._get_variance(t).sqrt() for t in scheduler.timesteps], dtype=torch.float64)
    found = torch.tensor(schedule.sigma, dtype=torch.float64)
    assert 1e-4 < (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_eta_1_is_euler_ancestral_on_a_scaled_latent(prediction_type: str) -> None:
    options = {k: v for k, v in SD.items() if k != "clip_sample"}
    scheduler = EulerAncestralDiscreteScheduler(**options, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    alphas = (1 / (1 + sigmas**2)).tolist()
    schedule = ddim_schedule(
        scheduler.timesteps.tolist(), alphas[:-1], alphas[1:], eta=1.0, prediction_type=prediction_type
    )
    own = schedule_of(DDIMScheduler(**SD, prediction_type=prediction_type, timestep_spacing="trailing"), 10, 1.0)
    for coefficients in ("timesteps", "latent_coefficient", "output_coefficient", "sigma"):  # its levels are DDIM's own
        assert getattr(own, coefficients) == pytest.approx(getattr(schedule, coefficients), rel=1e-5, abs=1e-5)
    source = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latent, output = torch.randn(2, 2, 4, 3, 3, generator=source)
        scale_in, scale_out = ((1 + sigmas[i] ** 2).sqrt().float() for i in (k, k + 1))
        scheduler.scale_model_input(latent * scale_in, timestep)
        found = scheduler.step(output, timestep, latent * scale_in, generator=torch.Generator().manual_seed(k))
        noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(k))
        expected = found.prev_sample / scale_out
        torch.testing.assert_close(
            schedule.mean(k, latent, output) + schedule.sigma[k] * noise, expected, rtol=1e-5, atol=1e-5
        )
    assert schedule.sigma[-1] == 0


SHIFT = 0.63  # FLUX's of 1024 tokens


def flow(steps: int, eta: float, **config: Any) -> Schedule:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps, mu=SHIFT if "use_dynamic_shifting" in config else None)
    return steps_of(scheduler, scheduler.timesteps.tolist(), eta)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True, "max_shift": 1.15}], ids=str)
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_a_flow_without_noise_is_the_schedulers_own_step(config: dict[str, Any], steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps, mu=SHIFT if "use_dynamic_shifting" in config else None)
    schedule = flow(steps, 0.0, **config)
    source = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latent, output = torch.randn(2, 2, 4, 3, 3, generator=source)
        expected = scheduler.step(output, timestep, latent).prev_sample
        torch.testing.assert_close(schedule.mean(k, latent, output), expected, rtol=1e-5, atol=1e-6)
        s = scheduler.sigmas[k]
        of_latent, of_output = schedule.clean[k]
        torch.testing.assert_close(of_latent * latent + of_output * output, latent - s * output)
    assert schedule.sigma == (0.0,) * steps
    torch.testing.assert_close(torch.tensor(schedule.timesteps), scheduler.timesteps)


def test_a_flows_mean_and_sigma_are_the_papers() -> None:
    """Equation 9 of Flow-GRPO as it stands there, t the input's time, sigma_t = a sqrt(t / (1 - t))."""
    schedule, a = flow(10, 0.7, shift=3.0), 0.7
    times = [*(t / 1000 for t in schedule.timesteps), 0.0]
    for k in range(10):
        t, step = times[k], times[k + 1] - times[k]
        noise = a * (t / (1 - (t if k else times[1]))) ** 0.5  # at t = 1, as the authors' code: the next time
        latent, velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        mean = latent + (velocity + noise**2 / (2 * t) * (latent + (1 - t) * velocity)) * step
        torch.testing.assert_close(schedule.mean(k, latent, velocity), mean, rtol=1e-6, atol=1e-6)
        assert schedule.sigma[k] == pytest.approx(noise * (-step) ** 0.5, rel=1e-6)
    assert all(sigma > 0 for sigma in schedule.sigma)  # the last one's too


MEAN, STD = 1.5, 0.5  # of the data


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0])
def test_a_flow_keeps_the_marginals_of_gaussian_data(level: float) -> None:
    """The velocity is known, so the end's mean and variance follow step by step, up to the error of Euler's steps."""
    for steps, bound in ((25, 0.03), (100, 0.01), (1600, 0.001)):
        mean, variance = gaussian_end(steps, level)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        assert variance == pytest.approx(STD**2, abs=bound)


def gaussian_end(steps: int, level: float) -> tuple[float, float]:
    schedule = even_flow(steps, level)
    mean, variance = 0.0, 1.0
    for k, timestep in enumerate(schedule.timesteps):
        slope, offset = gaussian_velocity(timestep / 1000)
        a, b = schedule.latent_coefficient[k], schedule.output_coefficient[k]
        mean, variance = (
            a * mean + b * (slope * mean + offset),
            (a + b * slope) ** 2 * variance + schedule.sigma[k] ** 2,
        )
    return mean, variance


def even_flow(steps: int, level: float) -> Schedule:
    sigmas = [1 - k / steps for k in range(steps + 1)]
    return flow_schedule([1000 * s for s in sigmas[:-1]], sigmas, noise_level=level)


def gaussian_velocity(s: float) -> tuple[float, float]:
    """E[e - x0 | x] = slope x + offset, of x = (1 - s) x0 + s e, jointly Gaussian."""
    slope = (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2)
    return slope, -MEAN - slope * (1 - s) * MEAN


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_a_flow_samples_two_points_with_the_mean_and_variance_of_the_data(level: float) -> None:
    """x0 is 1 with probability 0.7, else -1: far from Gaussian, and its velocity is exact."""
    count, schedule = 20_000, even_flow(400, level)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=source, dtype=torch.float64)
    for k, timestep in enumerate(schedule.timesteps):
        s = timestep / 1000
        odds = math.log(0.7 / 0.3) / 2 + (1 - s) * x / s**2
        clean = torch.tanh(odds)  # E[x0 | x]
        noise = torch.randn(count, generator=source, dtype=torch.float64)
        x = schedule.mean(k, x, (x - clean) / s) + schedule.sigma[k] * noise
    assert abs(x.mean() - 0.4) < 3 * (0.84 / count) ** 0.5  # 0.84 = 1 - 0.4^2
    assert abs(x.var() - 0.84) < 3 * (x.var() * 4 * 0.4**2 / count) ** 0.5 + 0.004  # 0.004: of the last steps' noise
    assert abs(x.abs() - 1).max() < 0.1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_inputs_are_signal_and_noise_as_the_scheduler_adds_them(prediction_type: str) -> None:
    """Against `add_noise`; and the clean latent comes back from the output that predicts it."""
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, timestep_spacing="trailing")
    schedule = schedule_of(scheduler, 10, 1.0)
    clean, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for k, timestep in enumerate(scheduler.timesteps):
        noised = schedule.signal[k] * clean + schedule.noise[k] * noise
        torch.testing.assert_close(noised, scheduler.add_noise(clean, noise, timestep), rtol=1e-5, atol=1e-5)
        velocity = scheduler.get_velocity(clean, noise, timestep)
        output = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]
        of_latent, of_output = schedule.clean[k]
        torch.testing.assert_close(of_latent * noised + of_output * output, clean, rtol=1e-4, atol=1e-4)
    assert schedule.alpha_bar == pytest.approx(scheduler.alphas_cumprod[scheduler.timesteps].tolist(), rel=1e-5)
    assert schedule.end == (1.0, 0.0)


def test_a_flows_inputs_are_signal_and_noise_as_its_scheduler_adds_them() -> None:
    """Against `scale_noise`; alpha-bar is the signal's share of the variance, whatever the latent's scale."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    schedule = flow(7, 0.7, shift=3.0)
    clean, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for k, timestep in enumerate(scheduler.timesteps):
        noised = schedule.signal[k] * clean + schedule.noise[k] * noise
        torch.testing.assert_close(noised, scheduler.scale_noise(clean, timestep[None], noise), rtol=1e-5, atol=1e-5)
        of_latent, of_output = schedule.clean[k]
        torch.testing.assert_close(of_latent * noised + of_output * (noise - clean), clean, rtol=1e-4, atol=1e-4)
    s = schedule.noise[3]
    assert schedule.alpha_bar[3] == pytest.approx((1 - s) ** 2 / ((1 - s) ** 2 + s**2))
    assert schedule.signal[0] == 0 and schedule.end == (1.0, 0.0)
