"""Pipelines of flow-matching families with random weights, small enough for a test, and a reward for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rlr_ray.assets import DIGITS

TOKENS = 12  # that the T5 tokenizer takes
WORDS = ["one", "two", "three", "seven", "eight", "handwritten", "a"]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:  # [B]
    return images.mean((1, 2, 3))


brightness.differentiable = True  # type: ignore[attr-defined]


def save_stable_diffusion_3(folder: Path, *, t5: bool = True) -> None:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(**FLOWS),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)


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
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16),
        vae=tiny_vae(**FLOWS),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
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


def clip_config() -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        eos_token_id=tokenizer.eos_token_id,
    )


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def _t5() -> T5EncoderModel:
    size = len(t5_tokenizer())
    return T5EncoderModel(T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
