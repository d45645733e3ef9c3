"""Classes that differ from others of the zoo in their call alone."""

from __future__ import annotations

from typing import Any

import diffusers as d

from tests.models.zoo.flows import ChromaPipeline
from tests.models.zoo.flux import FLUX, flux_parts, sd3_parts
from tests.models.zoo.parts import case, ddim, kl, mask, only, picture, pictures, shaken, texts
from tests.models.zoo.stable import SD, PixArtSigmaPipeline, controlnet, sd_parts, unet
from tests.models.zoo.xl import xl_parts

HALF = {"num_inference_steps": 8, "guidance_scale": 3.0, "strength": 0.6}


def with_pictures(n: int) -> dict[str, Any]:
    return texts(n) | {"image": pictures(n)}


@case
def StableDiffusionControlNetImg2ImgPipeline() -> Any:
    pipeline = d.StableDiffusionControlNetImg2ImgPipeline(**sd_parts(controlnet=controlnet()))
    return shaken(pipeline), HALF, lambda n: with_pictures(n) | {"control_image": pictures(n)}


@case
def StableDiffusionControlNetInpaintPipeline() -> Any:
    pipeline = d.StableDiffusionControlNetInpaintPipeline(**sd_parts(controlnet=controlnet()))
    masked = {"mask_image": mask()}
    return (
        shaken(pipeline),
        SD | {"strength": 1.0},
        lambda n: with_pictures(n) | {"control_image": pictures(n), **{key: [one] * n for key, one in masked.items()}},
    )


@case
def StableDiffusionPAGImg2ImgPipeline() -> Any:
    pipeline = d.StableDiffusionPAGImg2ImgPipeline(**sd_parts(), pag_applied_layers=["mid"])
    return shaken(pipeline), HALF | {"pag_scale": 2.0}, with_pictures


@case
def LatentConsistencyModelImg2ImgPipeline() -> Any:
    parts = sd_parts(unet=unet(time_cond_proj_dim=8), scheduler=d.LCMScheduler(), image_encoder=None)
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.8}
    return shaken(d.LatentConsistencyModelImg2ImgPipeline(**parts)), call, lambda n: only(n) | {"image": pictures(n)}


@case
def StableDiffusionXLControlNetPipeline() -> Any:
    control = controlnet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 24,
    )
    pipeline = d.StableDiffusionXLControlNetPipeline(**xl_parts(), controlnet=control, add_watermarker=False)
    return shaken(pipeline), SD, with_pictures


@case
def StableDiffusionXLPAGPipeline() -> Any:
    pipeline = d.StableDiffusionXLPAGPipeline(**xl_parts(), add_watermarker=False, pag_applied_layers=["mid"])
    return shaken(pipeline), SD | {"pag_scale": 2.0}, texts


@case
def StableDiffusion3Img2ImgPipeline() -> Any:
    return shaken(d.StableDiffusion3Img2ImgPipeline(**sd3_parts())), HALF | {"max_sequence_length": 12}, with_pictures


@case
def FluxControlImg2ImgPipeline() -> Any:
    call = FLUX | {"strength": 0.7}
    pipeline = d.FluxControlImg2ImgPipeline(**flux_parts(32, 16))
    return shaken(pipeline), call, lambda n: only(n) | {"image": pictures(n), "control_image": pictures(n)}


@case
def FluxControlInpaintPipeline() -> Any:
    call = FLUX | {"strength": 0.8}
    pipeline = d.FluxControlInpaintPipeline(**flux_parts(32, 16))
    return (
        shaken(pipeline),
        call,
        lambda n: only(n) | {"image": pictures(n), "control_image": pictures(n), "mask_image": [mask()] * n},
    )


@case
def ChromaImg2ImgPipeline() -> Any:
    base, *_ = ChromaPipeline()
    call = FLUX | {"strength": 0.7}
    return shaken(d.ChromaImg2ImgPipeline(**base.components)), call, with_pictures


@case
def PixArtAlphaPipeline() -> Any:
    base, call, arguments = PixArtSigmaPipeline()
    return d.PixArtAlphaPipeline(**base.components), call, arguments


@case
def StableDiffusionXLInstructPix2PixPipeline() -> Any:
    own = unet(
        8,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 24,
    )
    parts = xl_parts() | {"unet": own, "scheduler": ddim(), "vae": kl(shift=None)}
    pipeline = d.StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    call = SD | {"image_guidance_scale": 1.5}
    return shaken(pipeline), call, lambda n: texts(n) | {"image": [picture(i) for i in range(n)]}
