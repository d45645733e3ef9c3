"""`learning_rate: auto`: measured at a run's start, by how much an update would change the denoiser's predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlr_ray.core.sampler import Sampler, Trajectory
from rlr_ray.core.seeds import generator, normal, seed_of
from rlr_ray.errors import UserError
from rlr_ray.train.picture_engine import PictureEngine
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState

FRACTION = 0.02  # of the predictions, well above what rounding to bfloat16 changes
PART = 0.55  # of the rate that changes so much: with it the embedded digits (LoRA r 1, alpha 4) get 0.03
_CHAINS = 4  # of the first prompts
_PARTS = (0.25, 0.5, 0.75)  # of the chain, where predictions are compared
_TRIES, _CLOSE = 8, 0.02  # rates tried at most; relative error that is close enough


def set_learning_rate(engine: PictureEngine, state: TrainState, process: Process) -> bool:
    """Measure the rate of a run whose recipe says auto, unless it is known; whether it was measured now.

    The leading process measures, and all take its number, so that they go on alike whatever they compute with.
    """
    if state.rate is not None:
        return False
    rate = measured_rate(engine) if process.leads else 0.0
    state.rate = float(process.reduce(torch.tensor(rate, dtype=torch.float64, device=engine.device)))
    return True


@torch.no_grad()
def measured_rate(engine: PictureEngine) -> float:
    """PART of the rate that changes predictions by FRACTION, to two digits: some hundred forwards, a dozen backwards.

    It depends on the model, the adapter, the sampler and the first prompts; not on the run's seed, nor on the reward.
    """
    prompts = [engine.prompts[i % len(engine.prompts)] for i in range(_CHAINS)]
    steps = sorted({int(part * len(engine.sampler)) for part in _PARTS})
    start = engine.start([seed_of("learning rate", i) for i in range(_CHAINS)], prompts)
    sampler, theta, shape = engine.sampler, engine.model.initial_theta, engine.config.plan_shape
    trajectory = sampler.sample(theta, *start, stop=steps[-1])
    signs = random_signs(theta)
    if shape.first_order_steps or shape.has_half_order:
        signs = gradient_signs(sampler, theta + 1e-3 * signs, trajectory, steps)
    return float(f"{PART * rate_of_change(sampler, theta, signs, trajectory, steps, FRACTION):.2g}")


def random_signs(theta: Tensor) -> Tensor:  # [P] -> [P]
    return torch.randint(2, theta.shape, generator=generator("learning rate")).to(theta).mul_(2).sub_(1)


@torch.enable_grad()
def gradient_signs(sampler: Sampler, theta: Tensor, trajectory: Trajectory, steps: list[int]) -> Tensor:  # [P]
    """Signs of the gradient of a random projection of the predictions at theta [P]: as Adam moves when it is sure.

    Beside random ones they act together: on the embedded digits 6 times as much, in layers 8 times as wide 15 times.
    Theta is to lie beside the start of an adapter whose product begins with a factor of 0. A chain at a time.
    """
    total = torch.zeros_like(theta)
    for k in steps:
        for b, latent in enumerate(trajectory.latents[k]):
            leaf, conditioning = theta.clone().requires_grad_(), trajectory.conditioning
            prompt = {name: value[b : b + 1] for name, value in conditioning.items()}
            output = sampler.denoiser(leaf, latent[None], sampler.schedule.timesteps[k], prompt)
            along = normal(tuple(output.shape), torch.float32, "learning rate", k, b).to(output)
            total += torch.autograd.grad((output * along).sum(), leaf)[0]
    return total.sign()


def rate_of_change(
    sampler: Sampler,
    theta: Tensor,  # [P]
    signs: Tensor,  # [P]
    trajectory: Trajectory,
    steps: list[int],
    fraction: float,
) -> float:
    """The r at which `|f(theta + r signs) - f(theta)| / |f(theta)|` is the fraction, to 2 %.

    f are the predictions at these steps' latents, |.| the root of the mean square over all of them: Adam moves each
    number by about its rate. By secants of the logarithms, since the change is linear in small r (quadratic where what
    is trained is a product of zeros). Raises UserError if no rate changes anything.
    """

    def predictions(at: Tensor) -> list[Tensor]:
        latents, timesteps = trajectory.latents, sampler.schedule.timesteps
        return [sampler.denoiser(at, latents[k], timesteps[k], trajectory.conditioning).double() for k in steps]

    at_start = predictions(theta)
    size = sum(float(one.square().sum()) for one in at_start)

    def logarithm(rate: float) -> float:
        """Logarithm of the change over the fraction, cut to -5 .. 5."""
        pairs = zip(predictions(theta + rate * signs), at_start, strict=True)
        part = math.sqrt(sum(float((moved - one).square().sum()) for moved, one in pairs) / size) / fraction
        return min(max(math.log(part), -5.0), 5.0) if part and math.isfinite(part) else -5.0 if part == 0 else 5.0

    rate, above, slope = 1e-3, logarithm(1e-3), 1.0
    for _ in range(_TRIES):
        if abs(above) < _CLOSE:
            return rate
        step = -above / slope
        before, above = above, logarithm(rate := rate * math.exp(step))
        slope = min(max((above - before) / step, 0.5), 3.0)
    raise UserError(
        f"train.learning_rate is 'auto', but no rate was seen to change the model's predictions by {fraction:g} of "
        f"them (the last was {rate:.2g}); see that the adapter is in the denoiser, or give the rate as a number"
    )
