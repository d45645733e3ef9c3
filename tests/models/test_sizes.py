"""What a dry run tells of a model without its weights, against the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlr_ray.cli import main
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.models import module_bytes
from rlr_ray.models.loading import load_model
from rlr_ray.models.sizes import describe_sizes, sizes_of
from rlr_ray.train.engine import Engine
from tests.models.common import recipe
from tests.models.tiny import save_flux, save_stable_diffusion_3
from tests.models.zoo import CASES
from tests.models.zoo.parts import picture

LORA = {"type": "LORA", "r": 2, "target_modules": ["to_q", "to_out.0"]}
IA3 = {"type": "IA3", "target_modules": ["to_v"], "feedforward_modules": []}
OURS = ("num_inference_steps", "height", "width", "guidance_scale")
SAVE = {"stable_diffusion_3": save_stable_diffusion_3, "flux": save_flux}


def saved(name: str, folder: Path, adapter: dict[str, Any] = LORA, **changes: Any) -> RunConfig:
    if name in SAVE:
        SAVE[name](folder / "pipeline")  # type: ignore[operator]
    return recipe(name, folder / "pipeline", folder / "runs", adapter=adapter, **changes)


def without_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("name", "adapter", "dtype"),
    [("stable_diffusion_3", LORA, "bfloat16"), ("flux", IA3, "float16"), ("digits", LORA, "float32")],
)
def test_sizes_from_config_files_are_those_of_the_loaded_model(
    name: str, adapter: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    config = saved(name, tmp_path, adapter, model={"dtype": dtype})
    real: Any = load_model(config.model, config.adapter, config.sampler, torch.device("cpu"))
    without_weights(tmp_path / "pipeline")
    sizes, said = sizes_of(config), describe_sizes(config)
    parts = {part: module for part, module in real.pipeline.components.items() if isinstance(module, torch.nn.Module)}
    assert sizes.parts.keys() == parts.keys()
    for part, module in parts.items():
        own = {key: value for key, value in module.named_parameters() if not value.requires_grad}
        count, size = sizes.parts[part]
        assert count == sum(value.numel() for value in own.values())
        assert size == module_bytes(module) - sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
        assert f"{count:,} parameters" in said
    assert sizes.trained == len(real.initial_theta)
    assert f"trained: {sizes.trained:,} numbers in {real.trained} (P), float32" in said
    assert sizes.model.latent_shape == real.latent_shape and sizes.model.schedule == real.schedule
    assert f"latent: {' x '.join(map(str, real.latent_shape))}" in said and "not known without a measurement" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": {"target_modules": ["to_nothing"]}}, r"to_nothing.*layers that exist: .*attn\.to_q"),
        ({"model": {"height": 10}}, r"divisible by 4 but are 10"),
    ],
)
def test_what_does_not_go_together_is_found_without_weights(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved("stable_diffusion_3", tmp_path, **changes)
    without_weights(tmp_path / "pipeline")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.raises(UserError, match=words):
        describe_sizes(config)
    assert main(["train", "--config", str(file), "--dry-run"]) == 2
    assert "target_modules" in (said := capsys.readouterr().err) or "model.height" in said


def test_a_dry_run_goes_on_without_config_files(tmp_path: Path) -> None:
    config = saved("stable_diffusion_3", tmp_path)
    (tmp_path / "pipeline" / "transformer" / "config.json").unlink()
    said = describe_sizes(config)
    assert (
        "sizes: unknown; the config files of the pipeline" in said
        and "all but its weights" in said
        and "\nnot known" in said
    )


@pytest.mark.parametrize("name", ["FluxInpaintPipeline", "WanPipelineA14B"])
def test_any_pipeline_is_told_without_weights(name: str, tmp_path: Path) -> None:
    """Latent, schedule, frames and numbers trained are those of the pipeline with its weights, which are deleted."""
    pipeline, call, _ = CASES[name]()
    pipeline.save_pretrained(tmp_path / "pipeline")
    picture(1).save(tmp_path / "picture.png")
    row = {"prompt": "seven", "image": str(tmp_path / "picture.png"), "mask_image": str(tmp_path / "picture.png")}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    call = {key: value for key, value in call.items() if key not in OURS}
    model = {"name": "auto", "path": str(tmp_path / "pipeline"), "height": 16, "width": 16, "call": call}
    adapter = {"type": "LORA", "r": 2, "target_modules": ["to_q"]}
    config = recipe("auto", tmp_path, tmp_path, model=model, adapter=adapter, prompts=str(tmp_path / "prompts.jsonl"))
    whole = Engine(config).model
    for weights in (tmp_path / "pipeline").rglob("*.safetensors"):
        weights.unlink()
    sizes = sizes_of(config)
    assert sizes.model.latent_shape == whole.latent_shape
    assert sizes.model.schedule == whole.schedule
    assert sizes.model.frames == whole.frames
    assert sizes.trained == len(whole.initial_theta)
    assert sizes.parts["transformer"][0] == sum(one.numel() for one in pipeline.transformer.parameters())
    assert "numbers in transformer" in describe_sizes(config)
