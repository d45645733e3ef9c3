"""Qwen-Image and Z-Image."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.models.zoo.parts import (
    case,
    dynamic,
    embeddings,
    flow,
    kl,
    mask,
    picture,
    pictures,
    qwen3,
    shaken,
    texts,
    tokenizer,
)
from tests.models.zoo.stable import SD


def qwen_parts(**more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    own = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.1, 1.2, 1.3, 1.4],
    )
    parts = {"transformer": own, "vae": vae, "scheduler": dynamic(), "text_encoder": None, "tokenizer": None}
    return parts | more


def qwen_texts(n: int) -> dict[str, Any]:
    """Prompts of different lengths, with their masks."""
    masks = torch.ones(n, 6, dtype=torch.long)
    for i in range(n):
        masks[i, 3 + i % 4 :] = 0
    return {
        "prompt_embeds": embeddings(n, 6, 16),
        "prompt_embeds_mask": masks,
        "negative_prompt_embeds": embeddings(n, 6, 16, salt=1),
        "negative_prompt_embeds_mask": torch.stack(
            [masks[i] if i % 2 else torch.ones_like(masks[i]) for i in range(n)]
        ),
    }


QWEN = {"num_inference_steps": 5, "true_cfg_scale": 3.0, "height": 16, "width": 16}


@case
def QwenImagePipeline() -> Any:
    return shaken(d.QwenImagePipeline(**qwen_parts())), QWEN, qwen_texts


@case
def QwenImageImg2ImgPipeline() -> Any:
    call = QWEN | {"strength": 0.7}
    return shaken(d.QwenImageImg2ImgPipeline(**qwen_parts())), call, lambda n: qwen_texts(n) | {"image": pictures(n)}


@case
def QwenImageInpaintPipeline() -> Any:
    return (
        shaken(d.QwenImageInpaintPipeline(**qwen_parts())),
        QWEN | {"strength": 0.8},
        lambda n: qwen_texts(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def QwenImageEditPipeline() -> Any:
    """One picture for all chains: the pipeline repeats it."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

    module.calculate_dimensions = lambda area, ratio: (16, 16, None)  # of a million pixels otherwise
    call = QWEN | {"image": picture(3, 16, 16)}
    return shaken(d.QwenImageEditPipeline(**qwen_parts(processor=None))), call, qwen_texts


@case
def QwenImageEditPlusPipeline() -> Any:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    module.calculate_dimensions = lambda area, ratio: (16, 16)
    call = QWEN | {"image": [picture(3), picture(4)]}
    return shaken(d.QwenImageEditPlusPipeline(**qwen_parts(processor=None))), call, qwen_texts


@case
def QwenImageControlNetPipeline() -> Any:
    control = d.QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    call = QWEN | {"control_image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    return shaken(d.QwenImageControlNetPipeline(**qwen_parts(controlnet=control))), call, qwen_texts


def z_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    own = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        own.x_pad_token.fill_(1.0)
        own.cap_pad_token.fill_(1.0)
    return {
        "transformer": own,
        "vae": kl(),
        "scheduler": flow(shift=3.0),
        "text_encoder": qwen3(),
        "tokenizer": tokenizer(64),
    }


@case
def ZImagePipeline() -> Any:
    """Guidance with truncation: the first steps only."""
    call = SD | {"max_sequence_length": 12, "cfg_truncation": 0.7, "cfg_normalization": 1.0}
    return shaken(d.ZImagePipeline(**z_parts())), call, texts


@case
def ZImageImg2ImgPipeline() -> Any:
    call = SD | {"max_sequence_length": 12, "strength": 0.7}
    return shaken(d.ZImageImg2ImgPipeline(**z_parts())), call, lambda n: texts(n) | {"image": pictures(n)}


@case
def ZImageInpaintPipeline() -> Any:
    call = SD | {"max_sequence_length": 12, "strength": 0.8}
    return (
        shaken(d.ZImageInpaintPipeline(**z_parts())),
        call,
        lambda n: texts(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )
