"""Prompts by ranges of steps against plain diffusers whose prompt is swapped on the way, and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.assets import DIGITS
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.core.first_order import step_gradients
from rlr_ray.core.sampler import Sampler, Trajectory
from rlr_ray.models.loading import load_model
from rlr_ray.train.surrogate import OnlineSurrogate
from tests.models.common import CPU, SEEDS, assert_last_step_is_the_base_models, begun, generators, some_theta
from tests.models.test_stable_diffusion import LORA, plain_pipeline

TRIPLES = [
    ("a handwritten two", "seven", "a handwritten four"),
    ("outline nine", "a handwritten nine", "a handwritten nine"),
    ("a handwritten one",) * 3,
]
STAGES = [0, 0, 1, 2, 2]  # of 5 steps


def staged(**sampler: Any) -> Any:
    config = ModelConfig(path=str(DIGITS / "pipeline"))
    told = SamplerConfig(**{"steps": 5, "guidance_scale": 1.0, **sampler})
    return load_model(config, AdapterConfig(**LORA), told, CPU, stage_of_step=STAGES)


def swapped_images(guidance: float) -> Tensor:  # [3, 3, H, W]
    """Plain diffusers, its prompt's embeddings replaced at the ranges' bounds."""
    pipeline = plain_pipeline()
    guided = guidance > 1
    embeddings = []
    for texts in zip(*TRIPLES, strict=True):
        positive, negative = pipeline.encode_prompt(list(texts), "cpu", 1, guided)
        embeddings.append(torch.cat([negative, positive]) if guided else positive)

    def swap(_: Any, step: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": embeddings[STAGES[min(step + 1, len(STAGES) - 1)]]}

    return pipeline(
        [texts[0] for texts in TRIPLES],
        num_inference_steps=len(STAGES),
        eta=1.0,
        guidance_scale=guidance,
        output_type="pt",
        generator=generators(),
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images


def test_the_last_step_may_be_the_base_models() -> None:
    assert_last_step_is_the_base_models(staged(guidance_scale=3.0), [texts[0] for texts in TRIPLES])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_chain_draws_the_pictures_of_a_pipeline_whose_prompt_is_swapped(guidance: float) -> None:
    model = staged(guidance_scale=guidance)
    start = model.begin(SEEDS, model.encode(TRIPLES))
    latents = Sampler(model, model.schedule).sample(model.initial_theta, *start).latents
    with torch.no_grad():
        images = model.decode(latents[-1], None, start[2])
    torch.testing.assert_close(images, swapped_images(guidance), atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_is_the_models_own_under_its_stages_prompt(guidance: float) -> None:
    model = staged(guidance_scale=guidance)
    theta = some_theta(model)
    each = torch.stack([theta, 0.5 * theta, 2 * theta])  # a theta a chain
    latent, _, conditioning = model.begin(SEEDS, model.encode(TRIPLES))
    for k, timestep in enumerate(model.schedule.timesteps):
        plain = model.encode([texts[STAGES[k]] for texts in TRIPLES])
        for thetas in (theta, each):
            expected = model(thetas, latent, timestep, plain)
            assert torch.equal(model(thetas, latent, timestep, conditioning), expected)


def test_one_prompt_for_all_stages_is_the_plain_model() -> None:
    model = staged()
    texts = [triple[0] for triple in TRIPLES]
    ours, plain = (
        Sampler(model, model.schedule).sample(model.initial_theta, *begun(model, prompts)).latents
        for prompts in ([(text,) * 3 for text in texts], texts)
    )
    assert torch.equal(ours, plain)


def test_each_steps_gradient_is_autograds_through_its_own_prompt() -> None:
    model = staged()
    theta = some_theta(model)
    x_start, noise, conditioning = model.begin(SEEDS, model.encode(TRIPLES))
    head = Trajectory(x_start[None], noise, conditioning)
    reward = lambda latent: latent.square().flatten(1).sum(1)  # noqa: E731
    ours, _ = step_gradients(Sampler(model, model.schedule), theta, head, reward)
    copies, latent = [theta.clone().requires_grad_() for _ in STAGES], x_start
    for k, timestep in enumerate(model.schedule.timesteps):
        plain = model.encode([texts[STAGES[k]] for texts in TRIPLES])
        output = model(copies[k], latent, timestep, plain)
        latent = model.schedule.mean(k, latent, output) + model.schedule.sigma[k] * noise[k]
    expected = torch.stack(torch.autograd.grad(reward(latent).mean(), copies))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_the_surrogates_prompt_is_the_mean_over_stages() -> None:
    model = staged()
    parts = [OnlineSurrogate.features(model.encode(list(texts))) for texts in zip(*TRIPLES, strict=True)]
    torch.testing.assert_close(
        OnlineSurrogate.features(model.encode(TRIPLES)), torch.stack(parts).mean(0), atol=1e-6, rtol=1e-5
    )
