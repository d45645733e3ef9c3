"""A compiled denoiser predicts and differentiates as it does otherwise. Compiling takes minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from rlr_ray.assets import DIGITS
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.models.loading import load_model

pytestmark = pytest.mark.system
LORA = {"type": "LORA", "r": 2, "target_modules": ["attn2.to_out.0"]}
IA3 = {"type": "IA3", "target_modules": ["attn2.to_v"], "feedforward_modules": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline with a U-Net of one block."""
    pipeline = StableDiffusionPipeline.from_pretrained(DIGITS / "pipeline")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        dict(pipeline.unet.config)
        | {"block_out_channels": (8,), "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 2}
        | {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    )
    pipeline.register_modules(unet=unet)
    place = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("adapter", "by_blocks"), [(LORA, False), (LORA, True), (IA3, False)], ids=["lora", "lora by blocks", "ia3"]
)
def test_a_compiled_denoiser_is_the_same_function(folder: Path, adapter: dict[str, Any], by_blocks: bool) -> None:
    def load(compiled: bool) -> Any:
        keys = {"gradient_checkpointing": by_blocks, "compile": compiled}
        config = ModelConfig(name="stable_diffusion", path=str(folder), **keys)
        return load_model(config, AdapterConfig(**adapter), SamplerConfig(guidance_scale=3.0), torch.device("cpu"))

    plain, compiled = load(False), load(True)
    source = torch.Generator().manual_seed(0)
    theta = plain.initial_theta + 0.3 * torch.randn(len(plain.initial_theta), generator=source)
    own = theta + 0.1 * torch.randn(4, len(theta), generator=source)
    time = plain.schedule.timesteps[1]
    latent, conditioning = torch.randn(4, *plain.latent_shape, generator=source), plain.encode(["one"] * 4)
    compiled.encode(["one"] * 4)

    def prediction(model: Any, at: Tensor) -> Tensor:
        with torch.no_grad():
            return model(at, latent, time, conditioning)

    def gradient(model: Any) -> Tensor:
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad(model(leaf, latent, time, conditioning).square().sum(), leaf)[0]

    parts: tuple[Callable[[Any], Tensor], ...] = (
        lambda model: prediction(model, theta),
        lambda model: prediction(model, own),
        gradient,
    )
    for part in parts:
        expected = part(plain)
        assert (part(compiled) - expected).norm() < 1e-5 * expected.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
