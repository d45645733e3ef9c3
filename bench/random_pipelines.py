"""Pipelines with random weights, of Stable Diffusion 1.4's and XL's true shapes and tiny ones, and a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rlr_ray.assets import DIGITS

FOLDER = Path(__file__).resolve().parent.parent / "build" / "random_pipelines"  # git ignores it
FAMILIES = {
    "sd14": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "tiny_sd": "stable_diffusion",
    "tiny_sdxl": "stable_diffusion_xl",
}
DTYPES = {"sd14": "bfloat16", "sdxl": "bfloat16", "tiny_sd": "float32", "tiny_sdxl": "float32"}

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_XL = {
    "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
UNETS: dict[str, dict[str, Any]] = {  # diffusers' defaults are 1.4's
    "sd14": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": _XL
    | {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
    "tiny_sd": {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": (_CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", _CROSS_UP),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    "tiny_sdxl": _XL
    | {
        "sample_size": 8,
        "block_out_channels": (16, 16, 32),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "norm_num_groups": 8,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}
_TEXT_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def denoiser(size: str) -> UNet2DConditionModel:
    """A UNet of this shape, on torch's default device."""
    return UNet2DConditionModel(**UNETS[size])


def random_pipeline(size: str, device: torch.device) -> Any:
    """A pipeline of this shape in its dtype; its weights are drawn on the device, where that is quick."""
    tiny, xl = size.startswith("tiny"), FAMILIES[size] == "stable_diffusion_xl"
    tokenizer = CLIPTokenizer.from_pretrained(DIGITS / "pipeline" / "tokenizer", model_max_length=77)
    torch.manual_seed(0)
    with device:
        parts: dict[str, Any] = {"unet": denoiser(size), "vae": _vae(tiny, xl)}
        parts["text_encoder"] = CLIPTextModel(_text(tokenizer, _TEXT_TINY if tiny else _TEXT, tiny))
        if xl:
            second = _text(tokenizer, _TEXT_TINY if tiny else _TEXT_2, tiny)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    for part in parts.values():
        part.to(getattr(torch, DTYPES[size]))
    parts |= {"tokenizer": tokenizer, "scheduler": _scheduler()}
    if xl:
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **unchecked)


def saved(size: str, device: torch.device) -> Path:
    """The folder of such a pipeline, written the first time that it is asked for."""
    folder = FOLDER / size
    if not (folder / "model_index.json").exists():  # which is written last
        random_pipeline(size, device).save_pretrained(folder)
    return folder


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:  # [B]
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


def _text(tokenizer: Any, shape: dict[str, int], tiny: bool) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer) if tiny else 49408,
        max_position_embeddings=77,
        projection_dim=shape["hidden_size"],
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )


def _vae(tiny: bool, xl: bool) -> AutoencoderKL:
    channels = (16, 32) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8 if tiny else 32,
        scaling_factor=0.13025 if xl else 0.18215,
    )


def _scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels."""
    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    return DDIMScheduler(**levels, clip_sample=False, set_alpha_to_one=False)
