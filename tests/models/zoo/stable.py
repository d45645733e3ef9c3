"""Stable Diffusion and its kin."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.models.tiny import clip_tokenizer
from tests.models.zoo.parts import (
    case,
    clip,
    ddim,
    embeddings,
    kl,
    mask,
    only,
    pictures,
    shaken,
    t5,
    texts,
    tokenizer,
)


def unet(channels: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    return d.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
        **{"cross_attention_dim": 16, **more},
    )


def sd_parts(channels: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "vae": kl(shift=None),
        "text_encoder": t.CLIPTextModel(clip()),
        "tokenizer": clip_tokenizer(),
        "unet": unet(channels),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **more,
    }


SD = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 16, "width": 16}


@case
def StableDiffusionPipeline() -> Any:
    return shaken(d.StableDiffusionPipeline(**sd_parts())), SD | {"guidance_rescale": 0.7}, texts


@case
def StableDiffusionImg2ImgPipeline() -> Any:
    call = {"num_inference_steps": 8, "guidance_scale": 3.0, "strength": 0.6}
    return shaken(d.StableDiffusionImg2ImgPipeline(**sd_parts())), call, lambda n: texts(n) | {"image": pictures(n)}


@case
def StableDiffusionInpaintPipeline() -> Any:
    """With a UNet of 4 channels: the picture outside the mask is put back after each step."""
    return (
        shaken(d.StableDiffusionInpaintPipeline(**sd_parts())),
        SD | {"strength": 1.0},
        lambda n: texts(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def StableDiffusionInstructPix2PixPipeline() -> Any:
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "image_guidance_scale": 1.5}
    parts = sd_parts(8)
    return shaken(d.StableDiffusionInstructPix2PixPipeline(**parts)), call, lambda n: texts(n) | {"image": pictures(n)}


def controlnet(**more: Any) -> Any:
    return d.ControlNetModel(
        in_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
        conditioning_embedding_out_channels=(4, 8),
        **{"cross_attention_dim": 16, **more},
    )


@case
def StableDiffusionControlNetPipeline() -> Any:
    return (
        shaken(d.StableDiffusionControlNetPipeline(**sd_parts(controlnet=controlnet()))),
        SD | {"control_guidance_end": 0.6},
        lambda n: texts(n) | {"image": pictures(n)},
    )


@case
def StableDiffusionPAGPipeline() -> Any:
    return (
        shaken(d.StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers=["mid"])),
        SD | {"pag_scale": 2.0},
        texts,
    )


@case
def LatentConsistencyModelPipeline() -> Any:
    torch.manual_seed(0)
    parts = sd_parts(unet=unet(time_cond_proj_dim=8), scheduler=d.LCMScheduler(), image_encoder=None)
    call = {key: value for key, value in SD.items() if key != "strength"}
    return shaken(d.LatentConsistencyModelPipeline(**parts)), call, only


@case
def StableVideoDiffusionPipeline() -> Any:
    torch.manual_seed(0)
    own = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    scheduler = d.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    vision = t.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        intermediate_size=16,
    )
    vae = d.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        latent_channels=4,
    )
    pipeline = d.StableVideoDiffusionPipeline(
        unet=own,
        image_encoder=t.CLIPVisionModelWithProjection(vision),
        scheduler=scheduler,
        vae=vae,
        feature_extractor=t.CLIPImageProcessorPil(),
    )
    call = {"num_inference_steps": 5, "num_frames": 2, "height": 16, "width": 16, "max_guidance_scale": 2.5}
    return shaken(pipeline), call, lambda n: {"image": pictures(n)}


@case
def AnimateDiffPipeline() -> Any:
    torch.manual_seed(0)
    motion = d.MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=2,
        motion_max_seq_length=6,
    )
    parts = {key: value for key, value in sd_parts().items() if "safety" not in key}
    pipeline = d.AnimateDiffPipeline(**parts, motion_adapter=motion)
    return shaken(pipeline), SD | {"num_frames": 3}, texts


@case
def PixArtSigmaPipeline() -> Any:
    torch.manual_seed(0)
    own = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_elementwise_affine=False,
    )
    pipeline = d.PixArtSigmaPipeline(
        transformer=own, vae=kl(shift=None), scheduler=ddim(), text_encoder=t5(), tokenizer=tokenizer()
    )
    call = SD | {"use_resolution_binning": False, "max_sequence_length": 8, "clean_caption": False}
    return shaken(pipeline), call, texts


@case
def HunyuanDiTPipeline() -> Any:
    own = d.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
        text_len=77,
        text_len_t5=256,
    )
    pipeline = d.HunyuanDiTPipeline(
        transformer=own,
        vae=kl(shift=None),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
    )

    def arguments(n: int) -> dict[str, Any]:
        found = {}
        for salt, kind in enumerate(("", "negative_")):
            for number, length in (("", 77), ("_2", 256)):
                found[f"{kind}prompt_embeds{number}"] = embeddings(n, length, 32, salt=salt)
                found[f"{kind}prompt_attention_mask{number}"] = torch.ones(n, length, dtype=torch.long)
        return found

    return shaken(pipeline), SD | {"use_resolution_binning": False}, arguments
