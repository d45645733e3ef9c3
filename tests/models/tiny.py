"""Pipelines with random weights, small enough for a test, and a reward for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, UMT5Config, UMT5EncoderModel

from rlr_ray.assets import DIGITS
from scripts.small_pipelines import clip_config, sd3_transformer, stable_diffusion_3, t5_encoder, t5_tokenizer

TOKENS = 12  # that the T5 tokenizer takes
MOST_FRAMES = 6  # that the motion modules take
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


FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
GUIDED: dict[str, Any] = FLUX | {"pooled_projection_dim": 16, "guidance_embeds": True}


def flux_transformer(**options: Any) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(**GUIDED | options)


def save_flux(folder: Path, *, guidance_embeds: bool = True) -> None:
    torch.manual_seed(0)
    transformer = flux_transformer(guidance_embeds=guidance_embeds)
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


def save_stable_diffusion_xl(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = clip_config(tokenizer, 32, inner=37, heads=4)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
    ).save_pretrained(folder)


FLOWS: dict[str, Any] = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


def tiny_vae(latents: int = 4, blocks: int = 2, **options: Any) -> AutoencoderKL:
    """Each block but one halves a picture's sides."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=latents,
        norm_num_groups=2,  # with a group a channel no latent would change a picture's mean
        **options,
    )


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DIGITS / "pipeline" / "tokenizer")


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


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def wan_vae(**options: Any) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1 * i for i in range(4)],
        latents_std=[1 + 0.1 * i for i in range(4)],
        **{"scale_factor_spatial": 4} | options,
    )


def save_wan(folder: Path, *, unipc: bool = True, wan22: bool = False, second: bool = False) -> None:
    """4 pixels a latent pixel, 2 a token's side, and 4 frames; `wan22`: as TI2V-5B, `second`: as A14B."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**WAN)
    residual = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8}
    vae = wan_vae(**(residual if wan22 else {}))
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
