"""Stable Diffusion 3 and FLUX."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.models.tiny import GUIDED, clip_tokenizer, flux_transformer
from tests.models.zoo.parts import (
    case,
    clip,
    dynamic,
    embeddings,
    flow,
    kl,
    mask,
    only,
    picture,
    pictures,
    qwen3,
    shaken,
    t5,
    texts,
    tokenizer,
)
from tests.models.zoo.stable import SD


def sd3_parts(channels: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    own = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=channels,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return {
        "transformer": own,
        "scheduler": flow(shift=3.0),
        "vae": kl(channels),
        "text_encoder": t.CLIPTextModelWithProjection(clip()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t.CLIPTextModelWithProjection(clip()),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5(),
        "tokenizer_3": tokenizer(),
    }


@case
def StableDiffusion3Pipeline() -> Any:
    return shaken(d.StableDiffusion3Pipeline(**sd3_parts())), SD | {"max_sequence_length": 12}, texts


@case
def StableDiffusion3InpaintPipeline() -> Any:
    return (
        shaken(d.StableDiffusion3InpaintPipeline(**sd3_parts(16))),
        SD | {"max_sequence_length": 12, "strength": 0.8},
        lambda n: texts(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def StableDiffusion3ControlNetPipeline() -> Any:
    parts = sd3_parts()
    control = d.SD3ControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipeline = d.StableDiffusion3ControlNetPipeline(**parts, controlnet=control)
    return shaken(pipeline), SD | {"max_sequence_length": 12, "control_image": picture(3)}, texts


def flux_parts(channels: int = 16, out: int | None = None, latents: int = 4, **more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "transformer": flux_transformer(in_channels=channels, out_channels=out),
        "scheduler": dynamic(),
        "vae": kl(latents),
        "text_encoder": t.CLIPTextModel(clip()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(),
        **more,
    }


FLUX = {"num_inference_steps": 5, "guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 12}


@case
def FluxPipeline() -> Any:
    return shaken(d.FluxPipeline(**flux_parts())), FLUX | {"true_cfg_scale": 3.0}, texts


@case
def FluxImg2ImgPipeline() -> Any:
    call = FLUX | {"strength": 0.7}
    return shaken(d.FluxImg2ImgPipeline(**flux_parts())), call, lambda n: only(n) | {"image": pictures(n)}


@case
def FluxInpaintPipeline() -> Any:
    return (
        shaken(d.FluxInpaintPipeline(**flux_parts())),
        FLUX | {"strength": 0.8},
        lambda n: only(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def FluxFillPipeline() -> Any:
    return (
        shaken(d.FluxFillPipeline(**flux_parts(16 + 16 + 16, 16))),
        FLUX,
        lambda n: only(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def FluxKontextPipeline() -> Any:
    call = FLUX | {"_auto_resize": False, "max_area": 256}
    return shaken(d.FluxKontextPipeline(**flux_parts())), call, lambda n: only(n) | {"image": pictures(n)}


@case
def FluxControlPipeline() -> Any:
    return (
        shaken(d.FluxControlPipeline(**flux_parts(32, 16))),
        FLUX,
        lambda n: only(n) | {"control_image": pictures(n)},
    )


@case
def FluxControlNetPipeline() -> Any:
    control = d.FluxControlNetModel(**GUIDED)
    call = FLUX | {"controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.7}
    pipeline = d.FluxControlNetPipeline(**flux_parts(), controlnet=control)
    return shaken(pipeline), call, lambda n: only(n) | {"control_image": pictures(n)}


def flux2_parts(embeds: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    own = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32 if embeds else 16,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=embeds,
    )
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    return {"transformer": own, "scheduler": dynamic(), "vae": vae}


@case
def Flux2Pipeline() -> Any:
    """Mistral's processor is not built here: embeddings are given."""
    pipeline = d.Flux2Pipeline(**flux2_parts(True), text_encoder=None, tokenizer=None)
    call = {"num_inference_steps": 5, "guidance_scale": 4.0, "height": 16, "width": 16}
    return shaken(pipeline), call, lambda n: {"prompt_embeds": embeddings(n, 6, 32)}


@case
def Flux2KleinPipeline() -> Any:
    """With a reference picture."""
    text = qwen3(kind=t.Qwen3ForCausalLM)
    pipeline = d.Flux2KleinPipeline(**flux2_parts(False), text_encoder=text, tokenizer=tokenizer(64))
    call = {
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 16,
        "text_encoder_out_layers": (1,),
        "max_sequence_length": 12,
        "image": picture(3, 64, 64),
    }
    return shaken(pipeline), call, only
