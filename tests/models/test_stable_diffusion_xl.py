"""The adapter against a plain diffusers pipeline, on a tiny SDXL with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError
from tests.models.common import (
    assert_last_step_is_the_base_models,
    assert_loop_over_chains,
    assert_same,
    drawn,
    generators,
    model_of,
    recipe,
    some_theta,
    updates_raise_the_reward,
)
from tests.models.tiny import save_stable_diffusion_xl

PROMPTS = ["a handwritten two", "a handwritten seven", "seven"]
LORA = {"type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_v", "to_out.0"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    save_stable_diffusion_xl(folder)
    return folder


def load(folder: Path, guidance: float = 3.0, **model: Any) -> Any:
    sampler = {"steps": 4, "eta": 1.0, "guidance_scale": guidance}
    return model_of("stable_diffusion_xl", folder, LORA, sampler, **model)


def plain_images(folder: Path, lora: Path | None = None, **options: Any) -> Tensor:  # [3, 3, H, W]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    arguments = {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": 3.0, "output_type": "pt"} | options
    images: Tensor = pipeline(PROMPTS, generator=generators(), **arguments).images
    return images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_chain_draws_the_pictures_of_a_plain_pipeline(folder: Path, guidance: float) -> None:
    model = load(folder, guidance)
    expected = plain_images(folder, guidance_scale=guidance)
    assert_same(drawn(model, model.initial_theta, PROMPTS), expected)


def test_negative_prompts_draw_the_pictures_of_a_plain_pipeline(folder: Path) -> None:
    model = load(folder)
    negatives = ["a handwritten one", "one", "eight"]
    found = drawn(model, model.initial_theta, PROMPTS, negatives)
    assert_same(found, plain_images(folder, negative_prompt=negatives))
    assert (found - drawn(model, model.initial_theta, PROMPTS)).abs().max() > 1e-3


def test_a_text_that_both_tokenizers_cut_is_truncated(folder: Path) -> None:
    model, texts = load(folder), ["a handwritten two", "a handwritten two three", "two"]
    model.pipeline.tokenizer_2.model_max_length = 5
    assert model.truncated(texts) == []
    model.pipeline.tokenizer.model_max_length = 5
    assert model.truncated(texts) == ["a handwritten two three"]


def test_pictures_of_another_shape_are_asked_for_at_their_size(folder: Path) -> None:
    model = load(folder, height=16, width=24)
    expected = plain_images(folder, height=16, width=24)
    assert_same(drawn(model, model.initial_theta, PROMPTS), expected)


def test_the_adapter_does_in_diffusers_what_it_does_here(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    theta = some_theta(model)
    model.save_adapter(theta, tmp_path)
    found = plain_images(folder, tmp_path / "lora")
    assert_same(drawn(model, theta, PROMPTS), found)
    assert (found - plain_images(folder)).abs().max() > 1e-3


def test_updates_of_all_orders_raise_a_reward(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter": LORA, "train": {"learning_rate": 0.4}}
    run = updates_raise_the_reward(
        lambda output: recipe("stable_diffusion_xl", folder, output, **changes), tmp_path, interrupted=False
    )
    model = load(folder)
    expected = plain_images(folder, run / "lora")
    assert_same(drawn(model, model.load_adapter(run), PROMPTS), expected)


def test_a_theta_for_each_chain_predicts_as_one_by_one(folder: Path) -> None:
    model = load(folder)
    assert_loop_over_chains(model, PROMPTS)
    assert_last_step_is_the_base_models(model, PROMPTS)


def test_a_pipeline_of_another_family_is_refused() -> None:
    words = "^model.path '.*' holds a StableDiffusionPipeline; allowed for model.name 'stable_diffusion_xl': "
    with pytest.raises(UserError, match=f"{words}StableDiffusionXLPipeline"):
        load(DIGITS / "pipeline")
