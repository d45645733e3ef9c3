"""A pipeline with a run's adapter in its weights draws what plain diffusers does with the adapter loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor

from rlr_ray.config.model import AdapterConfig, ModelConfig
from rlr_ray.errors import UserError
from rlr_ray.models.fused import save_fused
from tests.models.common import calls, model_of, some_theta
from tests.models.tiny import TOKENS, save_wan
from tests.runs import tiny

LORA = {"type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0"]}


def loaded(folder: Path | str) -> Any:
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def draw(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(3)
    result = pipeline("a handwritten two", num_inference_steps=3, generator=source, output_type="pt", **options)
    return result.images if hasattr(result, "images") else result.frames


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(LORA, id="lora"),
        pytest.param(LORA | {"use_dora": True}, id="dora", marks=pytest.mark.slow),
        pytest.param(
            {"type": "LOHA", "r": 2, "target_modules": ["to_q", "conv_out"]}, id="loha", marks=pytest.mark.slow
        ),
    ],
)
def test_a_fused_pipeline_draws_what_the_adapter_beside_it_does(adapter: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("stable_diffusion", tiny()["path"], adapter, {"steps": 3, "guidance_scale": 1.0})
    theta = some_theta(model)
    model.save_adapter(theta, tmp_path)
    save_fused(ModelConfig(path=tiny()["path"]), AdapterConfig(**adapter), tmp_path, tmp_path / "whole")
    plain, beside = (loaded(tiny()["path"]) for _ in range(2))
    if adapter["type"] == "LORA":
        beside.load_lora_weights(tmp_path / "lora")
    else:
        beside.unet = PeftModel.from_pretrained(beside.unet, tmp_path / "adapter").base_model.model
    whole = loaded(tmp_path / "whole")
    names = [name for name, _ in whole.unet.named_parameters()]
    assert names == [name for name, _ in plain.unet.named_parameters()]
    expected = draw(beside)
    torch.testing.assert_close(draw(whole), expected, atol=2e-6, rtol=0)
    assert (draw(plain) - expected).abs().max() > 1e-3


def test_both_experts_are_fused(tmp_path: Path) -> None:
    save_wan(tmp_path / "base", second=True)
    adapter = LORA | {"target_modules": ["to_q", "to_v"]}
    sizes = {"height": 16, "width": 16, "num_frames": 5}
    model = model_of("wan", tmp_path / "base", adapter, {"steps": 3, "guidance_scale": 1.0}, **sizes, call=calls("wan"))
    model.save_adapter(some_theta(model, 1.0), tmp_path)
    save_fused(ModelConfig(path=str(tmp_path / "base")), AdapterConfig(**adapter), tmp_path, tmp_path / "whole")
    plain, beside = (loaded(tmp_path / "base") for _ in range(2))
    beside.load_lora_weights(tmp_path / "lora" / "transformer")
    one = draw(beside, **sizes, guidance_scale=1.0, max_sequence_length=TOKENS)
    beside.load_lora_weights(tmp_path / "lora" / "transformer_2", load_into_transformer_2=True)
    whole = loaded(tmp_path / "whole")
    pictures = [draw(each, **sizes, guidance_scale=1.0, max_sequence_length=TOKENS) for each in (whole, beside, plain)]
    torch.testing.assert_close(pictures[0], pictures[1], atol=2e-6, rtol=0)
    assert (pictures[1] - pictures[2]).abs().max() > 1e-4 < (pictures[1] - one).abs().max()


def test_an_adapter_that_no_weights_can_hold_is_refused(tmp_path: Path) -> None:
    adapter = {"type": "LILY", "target_modules": ["to_q"]}
    model = model_of("stable_diffusion", tiny()["path"], adapter, {"steps": 3, "guidance_scale": 1.0})
    model.save_adapter(model.initial_theta, tmp_path)
    with pytest.raises(UserError, match="PEFT puts no adapter of type LILY into the weights"):
        save_fused(ModelConfig(path=tiny()["path"]), AdapterConfig(**adapter), tmp_path, tmp_path / "whole")
