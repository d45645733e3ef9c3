"""The adapter against plain diffusers and plain autograd, on the embedded pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.assets import DIGITS
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.errors import UserError
from rlr_ray.models.facts import fact_of
from rlr_ray.models.loading import class_of, load_model
from rlr_ray.models.names import CLASSES, EMBEDDED
from rlr_ray.models.rows import ByRow
from tests.models.common import (
    assert_close_in_float32,
    assert_last_step_is_the_base_models,
    assert_loop_over_chains,
    assert_same,
    drawn,
    generators,
    model_of,
    some_theta,
)

PROMPTS = ["a handwritten two", "a handwritten seven", "seven"]
NEGATIVES = ["a handwritten one", "", "eight"]
LORA = {"type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["attn2.to_out.0"]}
SHARED = {"type": "VBLORA", "r": 2, "num_vectors": 8, "vector_length": 8, "target_modules": ["attn2.to_out.0"]}
IA3 = {"type": "IA3", "target_modules": ["attn2.to_v", "attn2.to_out.0"], "feedforward_modules": []}


def load(path: Path | str = DIGITS / "pipeline", adapter: dict[str, Any] = LORA, **sampler: Any) -> Any:
    return model_of("stable_diffusion", path, adapter, {"steps": 4, "guidance_scale": 1.0} | sampler)


def our_images(model: Any, theta: Tensor, negatives: Sequence[str] = ()) -> Tensor:  # [3, 3, H, W]
    return drawn(model, theta, PROMPTS, negatives)


def plain_pipeline(path: Path = DIGITS / "pipeline") -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_images(pipeline: StableDiffusionPipeline, **options: Any) -> Tensor:  # [3, 3, H, W]
    arguments = {"num_inference_steps": 4, "eta": 1.0, "guidance_scale": 1.0, "output_type": "pt"} | options
    return pipeline(PROMPTS, generator=generators(), **arguments).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_chain_draws_the_pictures_of_a_plain_pipeline(guidance: float, eta: float) -> None:
    model = load(guidance_scale=guidance, eta=eta)
    expected = plain_images(plain_pipeline(), guidance_scale=guidance, eta=eta)
    assert_same(our_images(model, model.initial_theta), expected)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_other_spacings_of_the_steps_are_the_schedulers(spacing: str) -> None:
    model, pipeline = load(timestep_spacing=spacing), plain_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    expected = plain_images(pipeline)
    assert_same(our_images(model, model.initial_theta), expected)


def test_negative_prompts_draw_the_pictures_of_a_plain_pipeline() -> None:
    model = load(guidance_scale=3.0)
    found = our_images(model, model.initial_theta, NEGATIVES)
    expected = plain_images(plain_pipeline(), guidance_scale=3.0, negative_prompt=NEGATIVES)
    assert_same(found, expected)
    assert (found - our_images(model, model.initial_theta)).flatten(1).norm(dim=1).gt(0.01).tolist() == [
        True,
        False,
        True,
    ]


def test_a_text_is_truncated_if_the_tokenizer_drops_its_end() -> None:
    model = load()
    longest = "a " * 14  # 16 tokens, start and end among them
    texts = [longest + "two", longest, "a handwritten two", longest + "two three"]
    assert model.truncated(texts) == [texts[0], texts[3]] and model.truncated([]) == []
    same = [torch.equal(*(model.encode([text])["prompt"] for text in (longest, other))) for other in texts]
    assert same == [True, True, False, True]  # what comes after is not seen


def test_v_prediction_draws_the_pictures_of_a_plain_pipeline(tmp_path: Path) -> None:
    pipeline = plain_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert_same(our_images(model, model.initial_theta), plain_images(plain_pipeline(tmp_path)))


@pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 16)])
def test_other_sizes_than_the_models_own(height: int, width: int) -> None:
    model = model_of("digits", None, LORA, {"steps": 4, "guidance_scale": 1.0}, height=height, width=width)
    expected = plain_images(plain_pipeline(), height=height, width=width)
    assert_same(our_images(model, model.initial_theta), expected)


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_theta_for_each_chain_is_a_loop_over_chains(adapter: dict[str, Any], guidance: float) -> None:
    model = load(adapter=adapter, guidance_scale=guidance)
    assert_loop_over_chains(model, PROMPTS)
    assert_last_step_is_the_base_models(model, PROMPTS)


@pytest.mark.parametrize("adapter", [LORA, SHARED], ids=["lora", "layers that share a parameter"])
def test_gradient_is_that_of_the_modules_own_parameters(adapter: dict[str, Any]) -> None:
    model = load(adapter=adapter)
    latent = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    theta, time = some_theta(model).requires_grad_(), model.schedule.timesteps[1]
    (ours,) = torch.autograd.grad(model(theta, latent, time, model.encode(PROMPTS)).square().sum(), theta)
    own = [model.tuned.modules["unet"].get_parameter(name) for name in model.tuned.vectors["unet"].shapes]
    for parameter, value in zip(own, model.tuned.of("unet", theta.detach()).values(), strict=True):
        parameter.data.copy_(value)
    embeddings = model.pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    output = model.pipeline.unet(latent, torch.tensor(int(time)), embeddings).sample
    expected = torch.autograd.grad(output.square().sum(), own)
    torch.testing.assert_close(ours, torch.cat([part.flatten() for part in expected]), atol=1e-5, rtol=1e-4)
    assert ours.norm() > 0


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 8}, {"use_rslora": True}], ids=str)
def test_lora_loads_in_plain_diffusers_and_draws_the_same_pictures(tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(adapter=LORA | options)
    theta = some_theta(model)
    file = model.save_adapter(theta, tmp_path)
    assert file == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    pipeline = plain_pipeline()
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = plain_images(pipeline)
    assert_same(our_images(model, theta), expected)
    assert (expected - plain_images(plain_pipeline())).abs().max() > 0.01  # the adapter does something


@pytest.mark.parametrize("adapter", [LORA, LORA | {"lora_alpha": 8}, IA3, SHARED], ids=str)
def test_a_saved_adapter_loads_to_the_same_bits(tmp_path: Path, adapter: dict[str, Any]) -> None:
    model, other = load(adapter=adapter), load(adapter=adapter | {"seed": 7})
    theta = some_theta(model)
    model.save_adapter(theta, tmp_path)
    initial = other.initial_theta.clone()
    assert torch.equal(other.load_adapter(tmp_path), theta)
    assert torch.equal(other.initial_theta, initial)


def plain_lora(folder: Path, **options: Any) -> None:
    """A LoRA as diffusers' and PEFT's users save one."""
    pipeline = plain_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_out.0"], **options))
    pipeline.save_lora_weights(folder / "lora", unet_lora_layers=get_peft_model_state_dict(pipeline.unet))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (LORA | {"r": 4, "lora_alpha": 4}, r"14 tensors differ.*lora_A.weight: found \[2, 32\], allowed: \[4, 32\]"),
        (LORA | {"target_modules": ["attn1.to_out.0"]}, r"28 tensors differ.*found none, allowed: \[2, 32\]"),
        (LORA | {"lora_alpha": 4}, r"saved with \{'lora_alpha': 2.*recipe's adapter has \{'lora_alpha': 4"),
        (IA3, r"holds no adapter of type IA3.*adapter\); .*--resume"),
    ],
)
def test_an_adapter_of_another_recipe_is_refused(tmp_path: Path, adapter: dict[str, Any], words: str) -> None:
    plain_lora(tmp_path)
    with pytest.raises(UserError, match=words):
        load(adapter=adapter).load_adapter(tmp_path)


def test_a_lora_of_plain_diffusers_loads(tmp_path: Path) -> None:
    plain_lora(tmp_path, init_lora_weights="gaussian")
    saved = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    model = load()
    for name, value in model.tuned.of("unet", model.load_adapter(tmp_path)).items():
        assert torch.equal(value, saved["unet." + name.replace(".default", "")])


def test_other_adapters_load_with_peft_and_draw_the_same_pictures(tmp_path: Path) -> None:
    model = load(adapter=IA3)
    theta = some_theta(model)
    folder = model.save_adapter(theta, tmp_path)
    pipeline = plain_pipeline()
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, folder).base_model.model
    assert_same(our_images(model, theta), plain_images(pipeline))


def test_bfloat16_weights_keep_a_float32_adapter_and_chain(tmp_path: Path) -> None:
    model = model_of("digits", None, LORA, {"steps": 4, "guidance_scale": 1.0}, dtype="bfloat16")
    assert_close_in_float32(model, load(), PROMPTS, tmp_path)


def test_initial_values_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = load(), load(), load(adapter=LORA | {"seed": 1})
    assert torch.equal(first.initial_theta, again.initial_theta)
    assert not torch.equal(first.initial_theta, other.initial_theta)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [*CLASSES, *EMBEDDED])
def test_every_name_is_a_class_of_pipelines(name: str) -> None:
    kind = class_of(ModelConfig(name=name))
    assert issubclass(getattr(diffusers, kind), diffusers.DiffusionPipeline)
    assert fact_of(kind).frames_a_second == (16 if name == "wan" else 8)
    assert name not in EMBEDDED or (EMBEDDED[name] / "model_index.json").is_file()


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.name is 'sd3'; allowed: auto, stable_diffusion, .*, moving_digits"):
        load_model(ModelConfig(name="sd3"), AdapterConfig(**LORA), SamplerConfig(), torch.device("cpu"))


@pytest.mark.parametrize("shown", [True, False])
def test_loading_leaves_the_libraries_progress_bars_as_they_were(shown: bool) -> None:
    settings = diffusers.utils.logging, transformers.utils.logging
    for one in settings:
        (one.enable_progress_bar if shown else one.disable_progress_bar)()
    try:
        load()
        assert [one.is_progress_bar_enabled() for one in settings] == [shown, shown]
    finally:
        for one in settings:
            one.enable_progress_bar()


def test_prompts_are_encoded_once_one_by_one_and_what_is_kept_is_bounded_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def encode(prompt: list[str]) -> tuple[Tensor, None]:
        asked.append(prompt)
        return torch.tensor([[float(len(text))] for text in prompt]), None

    by_row = ByRow(encode)
    for prompts in (["a", "bbb", "a"], ["bbb", "a"]):
        assert by_row(prompts)[0].tolist() == [[len(text)] for text in prompts]
    assert asked == [["bbb"], ["a"], ["a", "a"]] or asked == [["a"], ["bbb"], ["a", "a"]]
    monkeypatch.setattr("rlr_ray.models.rows.EMBEDDINGS_BYTES", 8)
    by_row(["cc", "dddd", "eeeee"])
    assert len(by_row.kept) == 2 and by_row.bytes == 8


def test_a_picture_that_lies_where_another_lay_is_encoded_by_itself() -> None:
    by_row = ByRow(lambda image, prompt: torch.tensor([[numpy.asarray(image).mean()]]))
    encoded = [by_row(Image.new("RGB", (4, 4), (i, i, i)), "a hat").item() for i in (1, 2, 3, 2, 1)]
    assert encoded == [1, 2, 3, 2, 1] and len(by_row.kept) == 3


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (LORA | {"type": "LOAR"}, ["LOAR", "LORA", "PEFT"]),
        (LORA | {"rank": 3}, ["rank", "allowed for LORA", "lora_alpha"]),
        (
            LORA | {"target_modules": ["nothing"]},
            ["nothing", "PEFT", "layers that exist: attn1.to_q, ", "attn2.to_out.0"],
        ),
        (LORA | {"r": "four"}, ["four", "PEFT"]),
        ({"type": "PREFIX_TUNING"}, ["PREFIX_TUNING", "PEFT"]),
        (IA3 | {"feedforward_modules": ["ff"]}, ["ff", "PEFT"]),
    ],
)
def test_a_bad_adapter_is_refused(adapter: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(adapter=adapter)
    assert all(word in str(error.value) for word in words)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json.*save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/folder", "./folder", "~/folder", "folder", "one/two/three"])
def test_a_folder_that_is_not_there_is_refused_at_once(path: str) -> None:
    with pytest.raises(
        UserError, match=rf"model.path '{path}': there is no such folder .*OWNER/NAME; correct the path"
    ):
        load(path)


def test_a_name_on_a_hub_that_is_not_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'owner/name' could not be .*no such folder, .*hf download owner/name --local"
    ):
        load("owner/name")


def test_a_size_that_the_vae_cannot_make_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.height is 18, of which .* makes 16; set"):
        load_model(ModelConfig(name="digits", height=18), AdapterConfig(**LORA), SamplerConfig(), torch.device("cpu"))
