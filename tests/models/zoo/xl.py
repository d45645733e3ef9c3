"""Stable Diffusion XL, its schedulers among them."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as t

from tests.models.tiny import clip_tokenizer
from tests.models.zoo.parts import case, clip, ddim, kl, mask, pictures, shaken, texts
from tests.models.zoo.stable import SD, unet


def xl_parts() -> dict[str, Any]:
    own = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 24,
    )
    return {
        "vae": kl(shift=None),
        "text_encoder": t.CLIPTextModel(clip()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t.CLIPTextModelWithProjection(clip()),
        "tokenizer_2": clip_tokenizer(),
        "unet": own,
        "scheduler": ddim(),
    }


@case
def StableDiffusionXLPipeline() -> Any:
    return shaken(d.StableDiffusionXLPipeline(**xl_parts(), add_watermarker=False)), SD, texts


@case
def StableDiffusionXLInpaintPipeline() -> Any:
    return (
        shaken(d.StableDiffusionXLInpaintPipeline(**xl_parts(), add_watermarker=False)),
        SD | {"strength": 0.9, "num_inference_steps": 6},
        lambda n: texts(n) | {"image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def StableDiffusionXLImg2ImgPipeline() -> Any:
    call = {"num_inference_steps": 8, "guidance_scale": 3.0, "strength": 0.6}
    return (
        shaken(d.StableDiffusionXLImg2ImgPipeline(**xl_parts(), add_watermarker=False)),
        call,
        lambda n: texts(n) | {"image": pictures(n)},
    )


@case
def StableDiffusionXLPipelineEDM() -> Any:
    """Playground 2.5's scheduler."""
    parts = xl_parts() | {"scheduler": d.EDMEulerScheduler()}
    return shaken(d.StableDiffusionXLPipeline(**parts, add_watermarker=False)), SD, texts


@case
def StableDiffusionXLPipelineKarras() -> Any:
    """Euler at Karras's noise levels, kept as they are."""
    scheduler = d.EulerDiscreteScheduler.from_config(ddim().config, use_karras_sigmas=True)
    return (
        shaken(d.StableDiffusionXLPipeline(**xl_parts() | {"scheduler": scheduler}, add_watermarker=False)),
        SD,
        texts,
    )
