"""The models and sizes at which speed is measured, each as a recipe and its engine.

sd14, sdxl: Stable Diffusion's true shapes, random weights; tiny_sd, tiny_sdxl: the same architectures, small enough for
a CPU; digits: the demo's recipe, in this process.
"""

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

from bench.common import ROOT
from rlr_ray.assets import DIGITS
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import load_config, parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.train.engine import Engine
from rlr_ray.utils.environment import prepare_process

FOLDER = ROOT / "build" / "random_pipelines"  # git ignores it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = {
    "sd14": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "tiny_sd": "stable_diffusion",
    "tiny_sdxl": "stable_diffusion_xl",
}
SIZES = (*FAMILIES, "digits")
TRUE_SIZES = ("sd14", "sdxl")
DTYPES = {"sd14": "bfloat16", "sdxl": "bfloat16", "tiny_sd": "float32", "tiny_sdxl": "float32"}
ADAPTER = {"type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}

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


def saved(size: str) -> Path:
    """The folder of such a pipeline, written the first time that it is asked for."""
    folder = FOLDER / size
    if not (folder / "model_index.json").exists():  # which is written last
        random_pipeline(size, DEVICE).save_pretrained(folder)
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


def recipe(size: str, **changes: Any) -> RunConfig:
    """The recipe of a size with some keys changed; the adapter is on at every step, so K = T is the whole chain."""
    if size == "digits":
        fixed = ["cluster=none", f"device={DEVICE.type}", "output_dir=build/bench", "adapter.off_below=null"]
        values = load_config(str(ROOT / "configs" / "digits.yaml"), fixed).model_dump(exclude_unset=True)
        return parse_config(merge(values, changes))
    model = {"name": FAMILIES[size], "path": str(saved(size)), "dtype": DTYPES[size]}
    values = {
        "name": "bench",
        "output_dir": "build/bench",
        "device": DEVICE.type,
        "cluster": "none",
        "model": model | ({"decode_slice": 4} if size in TRUE_SIZES else {}),
        "adapter": ADAPTER | {"off_below": None},
        "sampler": {"steps": 50 if size in TRUE_SIZES else 6, "guidance_scale": 5.0},
        "reward": {"name": "bench.models:brightness", "invalid": 0.0},  # random weights may overflow
        "prompts": ["a handwritten seven"],
        "estimator": {
            "preset": "custom",
            "first_order": {"steps": 1},  # with h = 2, the paper's
            "sub_chain": {"length": 2},
            "half_order": {"baseline": "batch"},
            "zeroth_order": {"count": 2, "chunk_size": 2},
        },
        "train": {"chains": 2, "chains_per_prompt": 1, "chunk_size": 1},
    }
    return parse_config(merge(values, changes))


def engine(size: str, **changes: Any) -> Engine:
    """The engine of a size; the threads of a CPU are one."""
    config = recipe(size, **changes)
    prepare_process(config.threads)
    return Engine(config)
