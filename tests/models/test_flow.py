"""Stable Diffusion 3 and FLUX against plain diffusers pipelines of their class, tiny and with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from peft import PeftModel
from torch import Tensor

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError
from tests.models.common import (
    assert_close_in_float32,
    assert_last_step_is_the_base_models,
    assert_loop_over_chains,
    assert_same,
    calls,
    drawn,
    generators,
    model_of,
    recipe,
    some_theta,
    updates_raise_the_reward,
)
from tests.models.tiny import TOKENS, save_flux, save_stable_diffusion_3

PROMPTS = ["a handwritten two", "a handwritten seven", "seven"]
NEGATIVES = ["a handwritten one", "", "eight"]
HEIGHT, WIDTH = 16, 12
LORA = {"type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_out.0"]}
IA3 = {"type": "IA3", "target_modules": ["to_v"], "feedforward_modules": []}
CLASSES = {"stable_diffusion_3": StableDiffusion3Pipeline, "flux": FluxPipeline}
FAMILIES = pytest.mark.parametrize("name", CLASSES)

pytestmark = pytest.mark.filterwarnings("ignore:sampler.guidance_scale 3 adds classifier-free guidance")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    save_stable_diffusion_3(folder / "stable_diffusion_3")
    save_flux(folder / "flux")
    return {name: folder / name for name in CLASSES}


def load(name: str, folder: Path, adapter: dict[str, Any] = LORA, sampler: Any = (), **model: Any) -> Any:
    keys = {"height": HEIGHT, "width": WIDTH, "call": calls(name), **model}
    return model_of(name, folder, adapter, {"steps": 3, "eta": 0.0, "guidance_scale": 3.0, **dict(sampler)}, **keys)


def our_images(model: Any, theta: Tensor) -> Tensor:  # [3, 3, H, W]
    return drawn(model, theta, PROMPTS, NEGATIVES)


def plain_images(name: str, pipeline: Any, **options: Any) -> Tensor:  # [3, 3, H, W]
    pipeline.set_progress_bar_config(disable=True)
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    arguments = {"negative_prompt": NEGATIVES, "height": HEIGHT, "width": WIDTH, scale: 3.0}
    images: Tensor = pipeline(
        PROMPTS,
        generator=generators(),
        num_inference_steps=3,
        output_type="pt",
        **arguments | {"max_sequence_length": TOKENS} | options,
    ).images
    return images


def plain(name: str, folder: Path, **parts: Any) -> Any:
    return CLASSES[name].from_pretrained(folder, dtype=torch.float32, **parts)


@FAMILIES
def test_without_noise_the_chain_draws_the_pictures_of_a_plain_pipeline(name: str, folders: dict[str, Path]) -> None:
    """Guided, with negative prompts, and not square; then without guidance."""
    found = our_images(load(name, folders[name]), load(name, folders[name]).initial_theta)
    assert_same(found, plain_images(name, plain(name, folders[name])))
    assert found.shape == (3, 3, HEIGHT, WIDTH)
    free = load(name, folders[name], sampler={"guidance_scale": 1.0, "embedded_guidance_scale": None})
    without = our_images(free, free.initial_theta)
    scale = {"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0}
    assert_same(without, plain_images(name, plain(name, folders[name]), **scale))
    assert (found - without).abs().max() > 1e-3


def test_flux_is_told_its_embedded_guidance(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    sampler = {"guidance_scale": 1.0}
    low, default = (
        load("flux", folders["flux"], sampler=sampler | more) for more in ({"embedded_guidance_scale": 1.0}, {})
    )
    pipeline = plain("flux", folders["flux"])
    expected = plain_images("flux", pipeline, guidance_scale=1.0, true_cfg_scale=1.0)
    found = our_images(low, low.initial_theta)
    assert_same(found, expected)
    assert (found - our_images(default, default.initial_theta)).abs().max() > 1e-5
    load("flux", folders["flux"])
    assert "guidance_scale 3 adds classifier-free guidance, at twice the cost" in caplog.text


def test_flux_without_embedded_guidance(tmp_path: Path) -> None:
    save_flux(tmp_path, guidance_embeds=False)
    model = load("flux", tmp_path)
    assert_same(our_images(model, model.initial_theta), plain_images("flux", plain("flux", tmp_path)))
    with pytest.raises(UserError, match=r"embedded_guidance_scale is 2, but .* takes none; leave the key out"):
        load("flux", tmp_path, sampler={"embedded_guidance_scale": 2.0})


def test_stable_diffusion_3_without_t5(tmp_path: Path) -> None:
    save_stable_diffusion_3(tmp_path, t5=False)
    model = load("stable_diffusion_3", tmp_path, call={})
    found = our_images(model, model.initial_theta)
    pipeline = plain("stable_diffusion_3", tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert_same(found, plain_images("stable_diffusion_3", pipeline, max_sequence_length=256))
    assert model.truncated(["a " * 15, "a " * 14]) == ["a " * 15]  # CLIP's 16 tokens, with start and end


@FAMILIES
def test_what_t5_cuts_is_truncated(name: str, folders: dict[str, Path]) -> None:
    texts = ["a " * TOKENS, "a " * (TOKENS - 1)]  # the end is a token too
    assert load(name, folders[name]).truncated(texts) == texts[:1]


@FAMILIES
@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_a_theta_for_each_chain_is_a_loop_over_chains(
    name: str, adapter: dict[str, Any], folders: dict[str, Path]
) -> None:
    model = load(name, folders[name], adapter)
    assert_loop_over_chains(model, PROMPTS, NEGATIVES)
    assert_last_step_is_the_base_models(model, PROMPTS, NEGATIVES)


@FAMILIES
def test_lora_loads_in_plain_diffusers_and_draws_the_same_pictures(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(name, folders[name])
    theta = some_theta(model)
    model.save_adapter(theta, tmp_path)
    pipeline = plain(name, folders[name])
    before = plain_images(name, pipeline)
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = plain_images(name, pipeline)
    assert_same(our_images(model, theta), expected)
    assert (expected - before).abs().max() > 1e-3
    assert torch.equal(load(name, folders[name]).load_adapter(tmp_path), theta)


@FAMILIES
def test_other_adapters_load_with_peft(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(name, folders[name], IA3)
    theta = some_theta(model)
    folder = model.save_adapter(theta, tmp_path)
    pipeline = plain(name, folders[name])
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder).base_model.model
    assert_same(our_images(model, theta), plain_images(name, pipeline))
    assert torch.equal(load(name, folders[name], IA3).load_adapter(tmp_path), theta)


@FAMILIES
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_weights_keep_a_float32_adapter_and_chain(
    name: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(name, folders[name], dtype=dtype)
    assert_close_in_float32(model, load(name, folders[name]), PROMPTS, tmp_path)


@FAMILIES
def test_updates_of_all_orders_raise_a_reward_also_if_interrupted(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = updates_raise_the_reward(lambda output: recipe(name, folders[name], output, adapter=LORA), tmp_path)
    model, pipeline = load(name, folders[name]), plain(name, folders[name])
    pipeline.load_lora_weights(folder / "lora")
    assert_same(our_images(model, model.load_adapter(folder)), plain_images(name, pipeline))


@FAMILIES
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": LORA | {"target_modules": ["to_nothing"]}}, r"PEFT refuses.*to_nothing.*target_modules"),
        (
            {"height": 10},
            "model.height is 10, of which .* makes 8|divisible by 4 but are 10",
        ),
        ({"width": 18}, "model.width is 18, of which .* makes 16|divisible by 4 but are 16 and 18"),
        ({"sampler": {"timestep_spacing": "linspace"}}, "'linspace', but this pipeline's times are its Flow"),
        ({"folder": DIGITS / "pipeline"}, "holds a StableDiffusionPipeline; .*; leave model.name out"),
    ],
    ids=["target", "height", "width", "spacing", "class"],
)
def test_what_does_not_work_is_refused(
    name: str, changes: dict[str, Any], words: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=words):
        load(name, **{"folder": folders[name]} | changes)


def test_sides_beyond_the_position_embedding_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"cannot be greater"):
        load("stable_diffusion_3", folders["stable_diffusion_3"], height=36)


@FAMILIES
def test_half_order_without_noise_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampler\.eta is 0, so the chain has no noise for half order"):
        recipe(name, folders[name], tmp_path, adapter=LORA, sampler={"steps": 3, "eta": 0.0, "guidance_scale": 1.0})
