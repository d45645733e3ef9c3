"""Pipelines run by their own call, against plain diffusers, finite differences and the families' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from rlr_ray.assets import DIGITS
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.core.sampler import Start
from rlr_ray.errors import UserError
from rlr_ray.models.loading import load_model
from rlr_ray.prompts.load import load_prompts
from tests.models import examine
from tests.models.common import CPU, SEEDS, model_of, recipe
from tests.models.examine import Subject
from tests.models.tiny import save_flux
from tests.models.zoo.parts import picture
from tests.models.zoo.stable import sd_parts, unet
from tests.runs import train_here

QUICK = ("StableDiffusionInpaintPipeline", "FluxPipeline", "WanPipelineA14B")
SAMPLE = (
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipelineEDM",
    "LatentConsistencyModelPipeline",
    "QwenImageEditPipeline",
    "ZImageImg2ImgPipeline",
    "LTX2Pipeline",
    "CogVideoXImageToVideoPipeline",
)
REFUSED = {"LTXConditionPipeline": "told per_token_timesteps besides"}
TIERS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE)]
LORA = {"type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_out.0"]}
SIZE = {"height": 16, "width": 16}
PROMPTS, NEGATIVES = ["a handwritten two", "seven", "eight"], ["a handwritten one", "two", "a"]

pytestmark = pytest.mark.filterwarnings("ignore:sampler.guidance_scale 3 adds classifier-free guidance")


@pytest.mark.parametrize("name", TIERS)
def test_a_class_of_pipelines(name: str, tmp_path: Path) -> None:
    """Pictures, gradients, steps run again, thetas in one batch, files and updates; of all classes: `make models`."""
    line = examine.line_of(name, tmp_path, bfloat16=False)
    assert not line.wrong, line.wrong


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED[name]):
        Subject(name, tmp_path)


def save_inpainting(folder: Path, channels: int = 4) -> Path:
    """A pipeline, and prompts beside it, of which each has a picture and a mask of its own."""
    torch.manual_seed(0)
    parts = sd_parts(unet=unet(channels, out_channels=4))
    diffusers.StableDiffusionInpaintPipeline(**parts).save_pretrained(folder / "pipeline")
    rows = []
    for i, text in enumerate(("a handwritten two", "a handwritten seven")):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (4 * i, 0, 16, 16))
        mask.save(folder / f"mask{i}.png")
        picture(i).save(folder / f"picture{i}.png")
        rows.append({"prompt": text, "image": f"picture{i}.png", "mask_image": f"mask{i}.png"})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "prompts.jsonl"


def test_inpainting_of_each_prompts_own_picture_raises_a_reward(tmp_path: Path) -> None:
    """By updates of all three orders; what the mask keeps stays as it is."""
    file = save_inpainting(tmp_path)
    model = {"name": "auto", "path": str(tmp_path / "pipeline"), "height": 16, "width": 16, "call": {"strength": 1.0}}
    adapter = {"type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_v", "to_out.0"]}
    config = recipe("auto", tmp_path, tmp_path, model=model, adapter=adapter, prompts=str(file))
    summary = train_here(config).load_summary()
    assert summary["gain"] > 2 * summary["gain_se"] > 0
    assert summary["adapter"].startswith("lora/")


def test_pictures_of_prompts_are_found_beside_the_file(tmp_path: Path) -> None:
    prompts = load_prompts(str(save_inpainting(tmp_path)))
    assert [prompt.metadata["image"] for prompt in prompts] == [str(tmp_path / f"picture{i}.png") for i in range(2)]
    assert prompts[0].drawn != prompts[1].drawn


def with_pictures(folder: Path, channels: int) -> tuple[Any, Start]:
    """An inpainting model, and two chains of its prompts."""
    prompts = load_prompts(str(save_inpainting(folder, channels)))
    config = ModelConfig(path=str(folder / "pipeline"), height=16, width=16, call={"strength": 1.0})
    model: Any = load_model(config, AdapterConfig(**LORA), SamplerConfig(steps=3), CPU, prompts[0].request)
    columns = [prompt.drawn_columns for prompt in prompts]
    return model, model.begin(SEEDS[:2], model.encode([prompt.text for prompt in prompts], (), columns))


def test_what_a_call_draws_beside_its_latent_is_the_same_each_time(tmp_path: Path) -> None:
    """Where the U-Net is told the masked picture, its VAE's noise comes from the chain's generator too."""
    model, (latent, _, conditioning) = with_pictures(tmp_path, channels=9)
    outputs = [model(model.initial_theta, latent, model.schedule.timesteps[1], conditioning) for _ in range(2)]
    assert torch.equal(*outputs)


def test_a_steps_mean_is_as_from_the_latent_that_the_call_makes_of_its_own(tmp_path: Path) -> None:
    model, (latent, _, conditioning) = with_pictures(tmp_path, channels=4)
    batch = model._batches.of(*(conditioning[name].tolist() for name in ("request", "seed")))
    ((_, theirs, output),) = model._batches.call.output(batch, 1, [latent], model.initial_theta).seen
    assert not torch.equal(theirs, latent)  # what the mask keeps is put back
    said = model(model.initial_theta, latent, model.schedule.timesteps[1], conditioning)
    torch.testing.assert_close(model.schedule.mean(1, latent, said), model.schedule.mean(1, theirs, output))


def test_a_latent_that_the_call_leaves_alone_is_the_chains_own(tmp_path: Path) -> None:
    """Not a copy: of small weights it would be rounded."""
    save_flux(tmp_path)
    model = model_of("auto", tmp_path, LORA, {"steps": 3, "guidance_scale": 1.0}, dtype="bfloat16", **SIZE)
    latent, _, conditioning = model.begin(SEEDS, model.encode(PROMPTS))
    latent = latent.contiguous()
    batch = model._batches.of(*(conditioning[name].tolist() for name in ("request", "seed")))
    for k in range(2):
        ((_, theirs, _),) = model._batches.call.output(batch, k, [latent], model.initial_theta).seen
        assert theirs is latent


def inpainting(folder: Path, sampler: Any = (), **model: Any) -> Any:
    keys = {"height": 16, "width": 16, **model}
    return model_of("auto", folder / "pipeline", LORA, {"steps": 3, **dict(sampler)}, **keys)


@pytest.mark.parametrize(
    ("keys", "sampler", "words"),
    [
        (
            {"call": {"strengthh": 1.0}},
            {},
            "'strengthh', which a StableDiffusionInpaintPipeline does not take",
        ),
        ({"call": {"num_inference_steps": 3}}, {}, "'num_inference_steps', which the run says itself"),
        ({"call": {"height": 16}}, {}, "model.height is set, but model.call says height too"),
        ({"num_frames": 5}, {}, "model.num_frames is set, but a StableDiffusionInpaintPipeline takes no num_frames"),
        ({}, {"embedded_guidance_scale": 3.0}, "embedded_guidance_scale is 3, but a .* takes none"),
        ({}, {}, "could not be called as the recipe says .*: Input is in incorrect format"),
    ],
)
def test_what_a_call_does_not_take_is_refused(keys: Any, sampler: Any, words: str, tmp_path: Path) -> None:
    save_inpainting(tmp_path)
    with pytest.raises(UserError, match=words):
        inpainting(tmp_path, sampler, **keys)


def test_a_call_computes_its_own_step_alone() -> None:
    """And what is frozen once a batch."""
    model = model_of("auto", DIGITS / "pipeline", LORA, {"steps": 4, "guidance_scale": 1.0})
    start = model.begin(SEEDS, model.encode(PROMPTS))
    model(model.initial_theta, start[0], model.schedule.timesteps[1], start[2])
    parts = {"unet": model.pipeline.unet.conv_in, "text": model.pipeline.text_encoder.get_input_embeddings()}
    calls: list[str] = []
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    for k in (3, 1):
        model(model.initial_theta, start[0], model.schedule.timesteps[k], start[2])
    assert calls == ["unet", "unet"]
