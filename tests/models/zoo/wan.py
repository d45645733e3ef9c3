"""Wan's videos."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers as d
import torch
import transformers as t
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v, pipeline_wan_vace, pipeline_wan_video2video

from tests.models import tiny
from tests.models.zoo.parts import case, picture, shaken, t5, texts, tokenizer

for _module in (pipeline_wan, pipeline_wan_i2v, pipeline_wan_vace, pipeline_wan_video2video):
    if not hasattr(_module, "ftfy"):  # which mends broken letters, and is no need of ours
        _module.ftfy = SimpleNamespace(fix_text=lambda text: text)


def wan_transformer(channels: int = 4) -> Any:
    return d.WanTransformer3DModel(**tiny.WAN | {"in_channels": channels})


def wan_parts(**more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "vae": tiny.wan_vae(),
        "tokenizer": tokenizer(),
        "text_encoder": t5(16, t.UMT5EncoderModel),
        "scheduler": d.UniPCMultistepScheduler(
            flow_shift=3.0,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            solver_order=1,
            disable_corrector=list(range(9)),
        ),
        **more,
    }


WAN = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 5}
WAN |= {"max_sequence_length": 12}


@case
def WanPipeline() -> Any:
    return shaken(d.WanPipeline(**wan_parts(transformer=wan_transformer()))), WAN, texts


@case
def WanPipelineA14B() -> Any:
    """Two experts, each with its own guidance."""
    parts = wan_parts(transformer=wan_transformer(), transformer_2=wan_transformer(), boundary_ratio=0.8)
    return shaken(d.WanPipeline(**parts)), WAN | {"guidance_scale_2": 1.5}, texts


@case
def WanImageToVideoPipelineA14B() -> Any:
    parts = wan_parts(
        transformer=wan_transformer(4 + 8),
        transformer_2=wan_transformer(4 + 8),
        boundary_ratio=0.8,
        image_encoder=None,
        image_processor=None,
    )
    call = WAN | {"guidance_scale_2": 1.5, "image": picture(3)}
    return shaken(d.WanImageToVideoPipeline(**parts)), call, texts


@case
def WanImageToVideoPipelineTI2V() -> Any:
    """One transformer, the first frame held, a timestep a token."""
    parts = wan_parts(transformer=wan_transformer(), image_encoder=None, image_processor=None, expand_timesteps=True)
    return shaken(d.WanImageToVideoPipeline(**parts)), WAN | {"image": picture(3)}, texts


@case
def WanVACEPipeline() -> Any:
    own = d.WanVACETransformer3DModel(**tiny.WAN | {"num_layers": 2}, vace_layers=[0], vace_in_channels=4 * 2 + 16)
    return (
        shaken(d.WanVACEPipeline(**wan_parts(transformer=own))),
        WAN | {"video": [picture(i) for i in range(5)]},
        texts,
    )


@case
def WanVideoToVideoPipeline() -> Any:
    pipeline = d.WanVideoToVideoPipeline(**wan_parts(transformer=wan_transformer()))
    call = {key: value for key, value in WAN.items() if key != "num_frames"} | {"strength": 0.7}
    return shaken(pipeline), call | {"video": [picture(i) for i in range(5)]}, texts
