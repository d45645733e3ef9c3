"""Pipelines that draw videos, with random weights, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextModel, UMT5Config, UMT5EncoderModel

from scripts.small_pipelines import clip_config, t5_tokenizer
from tests.models.tiny_flow import TOKENS, WORDS, clip_tokenizer, tiny_vae

MOST_FRAMES = 6  # that the motion modules take


def save_stable_diffusion(folder: Path) -> None:
    """What AnimateDiff's users put motion modules into; 2 pixels a latent pixel."""
    _stable_diffusion().save_pretrained(folder)


def save_motion_adapter(folder: Path, *, width: int = 8, most_frames: int = MOST_FRAMES) -> None:
    torch.manual_seed(1)
    motion = MotionAdapter(
        block_out_channels=(width,),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=2,
        motion_max_seq_length=most_frames,
    )
    for parameter in motion.parameters():  # its last layers may begin at 0
        torch.nn.init.normal_(parameter, std=0.2)
    motion.save_pretrained(folder)


def save_animatediff(folder: Path, motion_adapter: Path, *, with_adapter: bool = True) -> None:
    """As AnimateDiffPipeline saves itself; its `motion_adapter` may be left out, whose weights are in the unet too."""
    parts = {name: part for name, part in _stable_diffusion().components.items() if name != "safety_checker"}
    pipeline = AnimateDiffPipeline(**parts, motion_adapter=MotionAdapter.from_pretrained(motion_adapter))
    if not with_adapter:
        pipeline.register_modules(motion_adapter=None)
    pipeline.save_pretrained(folder)


def save_wan(folder: Path, *, unipc: bool = True, wan22: bool = False, second: bool = False) -> None:
    """4 pixels a latent pixel, 2 a token's side, and 4 frames; `wan22`: as TI2V-5B, `second`: as A14B."""
    torch.manual_seed(0)
    channels = 4
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1 * i for i in range(channels)],
        latents_std=[1 + 0.1 * i for i in range(channels)],
        scale_factor_spatial=8 if wan22 else 4,
        **({"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if wan22 else {}),
    )
    flow = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    tokenizer = t5_tokenizer(WORDS, TOKENS)
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(**flow) if unipc else FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
        transformer_2=transformer if second else None,
        boundary_ratio=0.9 if second else None,
        expand_timesteps=wan22,
    ).save_pretrained(folder)


def _stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_config(clip_tokenizer())),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
