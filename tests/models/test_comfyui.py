"""A LoRA's file for programs that read tensors alone: their formula gives the weights that were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from rlr_ray.errors import UserError
from tests.models.common import model_of, some_theta
from tests.runs import small_run, tiny, train_here


@pytest.mark.parametrize(
    "options",
    [{"lora_alpha": 2}, {"lora_alpha": 8}, {"lora_alpha": 4, "use_rslora": True}, {"lora_alpha": 3, "use_dora": True}],
)
def test_weights_are_those_that_were_trained(options: dict[str, Any], tmp_path: Path) -> None:
    """W + alpha / rank up @ down; of DoRA its rows at the lengths that `dora_scale` says."""
    adapter = {"type": "LORA", "r": 2, "target_modules": ["to_q", "to_out.0"], **options}
    model = model_of("stable_diffusion", tiny()["path"], adapter, {"steps": 3, "guidance_scale": 1.0})
    theta = some_theta(model)
    model.save_adapter(theta, tmp_path, also=["comfyui"])
    saved = load_file(tmp_path / "lora" / "comfyui.safetensors")
    unet = UNet2DConditionModel.from_pretrained(tiny()["path"], subfolder="unet")
    for name, layer in unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" not in saved:
            continue
        down, up = saved[f"{key}.lora_down.weight"], saved[f"{key}.lora_up.weight"]
        weight = layer.weight.data + saved[f"{key}.alpha"] / len(down) * up @ down
        if (scale := saved.get(f"{key}.dora_scale")) is not None:
            weight *= scale / weight.norm(dim=1, keepdim=True)
        layer.weight.data = weight
    latent = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = model.encode(["a handwritten two"])
    with torch.no_grad():
        expected = model(theta, latent, model.schedule.timesteps[1], prompts)
        embeddings = model.pipeline.encode_prompt(["a handwritten two"], "cpu", 1, False)[0]
        seen = unet(latent, model.schedule.timesteps[1], embeddings).sample
        assert (expected - model(model.initial_theta, latent, model.schedule.timesteps[1], prompts)).abs().max() > 1e-3
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-4)


def test_a_run_leaves_the_file_that_its_recipe_asks_for(tmp_path: Path) -> None:
    config = small_run(tmp_path, save_also=["comfyui"], train={"iterations": 1})
    train_here(config)
    assert (config.folder / "lora" / "comfyui.safetensors").is_file()


def test_a_format_of_lora_is_refused_for_other_adapters(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"save_also: comfyui is a format of LoRA, and adapter.type is 'IA3'"):
        small_run(tmp_path, save_also=["comfyui"], adapter={"type": "IA3", "target_modules": ["attn2.to_v"]})
