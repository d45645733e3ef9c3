"""Pipelines of flow-matching families with random weights, small enough for a test, and a reward for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rlr_ray.assets import DIGITS
from scripts.small_pipelines import clip_config, sd3_transformer, stable_diffusion_3, t5_encoder, t5_tokenizer

TOKENS = 12  # that the T5 tokenizer takes
WORDS = ["one", "two", "three", "seven", "eight", "handwritten", "a"]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:  # [B]
    return images.mean((1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


def save_stable_diffusion_3(folder: Path, *, t5: bool = True) -> None:
    torch.manual_seed(0)
    transformer = sd3_transformer(8, layers=2, heads=2, head=8, patch_size=2, dual_attention_layers=(0,))
    clip, third = clip_tokenizer(), t5_tokenizer(WORDS, TOKENS) if t5 else None
    stable_diffusion_3(transformer, tiny_vae(**FLOWS), clip_config(clip), (clip, third), shift=3.0).save_pretrained(
        folder
    )


def save_flux(folder: Path, *, guidance_embeds: bool = True) -> None:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    clip, t5 = clip_tokenizer(), t5_tokenizer(WORDS, TOKENS)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16),
        vae=tiny_vae(**FLOWS),
        text_encoder=CLIPTextModel(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
    ).save_pretrained(folder)


FLOWS: dict[str, Any] = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


def tiny_vae(**options: Any) -> AutoencoderKL:  # 2 pixels a latent pixel
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,  # with a group a channel no latent would change a picture's mean
        **options,
    )


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DIGITS / "pipeline" / "tokenizer")
