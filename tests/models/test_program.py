"""Pipelines run by their own call, against plain diffusers, finite differences and the families' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlr_ray.assets import DIGITS
from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler, Start
from rlr_ray.errors import UserError
from rlr_ray.prompts.load import load_prompts
from tests.models import examine
from tests.models.common import SEEDS, model_of, recipe, some_theta
from tests.models.examine import Subject
from tests.models.tiny_flow import save_flux, save_stable_diffusion_3
from tests.models.tiny_video import save_wan
from tests.models.zoo.parts import picture
from tests.models.zoo.stable import sd_parts
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


GOLDEN: dict[
    str, Any
] = {  # how a pipeline is made, its sides, what its call is told besides, how far figures may differ
    "digits": (None, {}, {}, 0.0),
    "stable_diffusion_3": (save_stable_diffusion_3, {"height": 16, "width": 12}, {"max_sequence_length": 12}, 0.0),
    "flux": (save_flux, {"height": 16, "width": 12}, {"max_sequence_length": 12}, 1e-5),
    # calls for the prompt and without it are apart there, in one batch here: the last bits of a gradient through a VAE
    "wan": (save_wan, {"height": 16, "width": 32, "num_frames": 5}, {"max_sequence_length": 12}, 5e-5),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_figures_are_those_of_the_familys_own_file(name: str, tmp_path: Path) -> None:
    """Of the digits to the last bit: chains, pictures, gradients of first and half order, thetas of chains' own."""
    save, size, call, tolerance = GOLDEN[name]
    if save is not None:
        save(tmp_path)
    path, sampler = tmp_path if save else DIGITS / "pipeline", {"steps": 4, "eta": 0.7, "guidance_scale": 3.0}
    family = model_of(name, None if name == "digits" else path, LORA, sampler, **size)
    program = model_of("pipeline", path, LORA, sampler, call=call, **size)
    assert program.schedule == family.schedule
    noise = family.begin(SEEDS, {})[1]
    packs = name == "flux"
    seen = figures(family, noise, lambda x: x)
    expected = figures(program, packed(program, noise) if packs else noise, unpacked(program, size) if packs else None)
    for key, value in seen.items():
        error = (expected[key] - value).norm() / value.norm()
        assert error <= tolerance, f"{key}: {error:g}"


def packed(program: Any, noise: Tensor) -> Tensor:
    return torch.stack([program.pipeline._pack_latents(one, len(one), *one.shape[1:]) for one in noise])


def unpacked(program: Any, size: dict[str, int]) -> Any:
    pipeline = program.pipeline
    return lambda x: pipeline._unpack_latents(x, size["height"], size["width"], pipeline.vae_scale_factor)


def figures(model: Any, noise: Tensor, shown: Any = None) -> dict[str, Tensor]:
    theta, sampler, shown = some_theta(model, 0.1), Sampler(model, model.schedule), shown or (lambda x: x)
    first, _, conditioning = model.begin(SEEDS, model.encode(PROMPTS, NEGATIVES))
    start: Start = (first, noise, conditioning)
    whole = sampler.sample(theta, *start)
    begun = sampler.sample(theta, *start, stop=3)

    def objective(latent: Tensor) -> Tensor:
        pictures = model.decode(latent, None, start[2])
        weights = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(5))
        return (pictures * weights).flatten(1).sum(1)

    thetas = torch.stack([some_theta(model, 0.1) * factor for factor in (0.5, 1.0, 2.0)])
    with torch.no_grad():
        apart = model(thetas, whole.latents[2], model.schedule.timesteps[2], start[2])
    return {
        "chains": torch.stack([shown(one) for one in whole.latents]),
        "pictures": model.decode(whole.latents[-1], None, start[2]),
        "first order": first_order(sampler, theta, begun, objective)[0],
        "half order": half_order(sampler, theta, whole, range(1, 3), torch.tensor([1.0, -0.5, 0.3])),
        "thetas of chains' own": shown(apart),
    }


def save_inpainting(folder: Path) -> Path:
    """A pipeline, and prompts beside it, of which each has a picture and a mask of its own."""
    torch.manual_seed(0)
    diffusers.StableDiffusionInpaintPipeline(**sd_parts()).save_pretrained(folder / "pipeline")
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


def inpainting(folder: Path, sampler: Any = (), **model: Any) -> Any:
    keys = {"height": 16, "width": 16, **model}
    return model_of("pipeline", folder / "pipeline", LORA, {"steps": 3, **dict(sampler)}, **keys)


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
        ({}, {"embedded_guidance_scale": 3.0}, "embedded_guidance_scale is set, but a .* has one guidance"),
        ({"compile": True}, {}, "model.compile is set"),
        ({}, {}, "could not be called with model.call {} and the first prompt: Input is in incorrect format"),
    ],
)
def test_what_a_call_does_not_take_is_refused(keys: Any, sampler: Any, words: str, tmp_path: Path) -> None:
    save_inpainting(tmp_path)
    with pytest.raises(UserError, match=words):
        inpainting(tmp_path, sampler, **keys)


def test_a_class_is_known_by_the_pipeline_and_families_refuse_a_call() -> None:
    model = model_of("auto", DIGITS / "pipeline", LORA, {"steps": 3})
    assert type(model).__name__ == "StableDiffusion"
    called = model_of("auto", DIGITS / "pipeline", LORA, {"steps": 3}, call={"guidance_rescale": 0.5})
    assert type(called).__name__ == "Program"
    with pytest.raises(UserError, match=r"model\.call is set, but model\.name is 'digits'"):
        model_of("digits", None, LORA, {"steps": 3}, call={"guidance_rescale": 0.5})


def test_a_call_computes_its_own_step_alone() -> None:
    """And what is frozen once a batch."""
    model = model_of("pipeline", DIGITS / "pipeline", LORA, {"steps": 4, "guidance_scale": 1.0})
    start = model.begin(SEEDS, model.encode(PROMPTS))
    model(model.initial_theta, start[0], model.schedule.timesteps[1], start[2])
    parts = {"unet": model.pipeline.unet.conv_in, "text": model.pipeline.text_encoder.get_input_embeddings()}
    calls: list[str] = []
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    for k in (3, 1):
        model(model.initial_theta, start[0], model.schedule.timesteps[k], start[2])
    assert calls == ["unet", "unet"]
