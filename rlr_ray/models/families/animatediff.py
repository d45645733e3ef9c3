"""AnimateDiff, from a local folder or the hub: Stable Diffusion 1.x with motion modules, which draws videos.

F frames, each of its own latent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from torch import Tensor

from rlr_ray.core.sampler import Conditioning
from rlr_ray.errors import UserError
from rlr_ray.models.families.stable_diffusion import StableDiffusion
from rlr_ray.models.loading import could_not, load_pipeline, pipeline_index, place_of

_FRAMES = 16  # of the pipeline's own call
_BASE = "StableDiffusionPipeline"


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any) -> AnimateDiff:
    """The pipeline at `config.path`, or Stable Diffusion's there with the modules at `config.motion_adapter`.

    Then its noise levels are those that AnimateDiff's modules were trained with: betas that are linear.
    """
    pipeline_class = pipeline_index(config, AnimateDiffPipeline, "AnimateDiff")["_class_name"]
    options: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}  # of IP-Adapter
    if pipeline_class == _BASE:
        options |= {"motion_adapter": _motion_adapter(config), "also": [_BASE]}
    elif config.motion_adapter is not None:
        raise UserError(
            f"model.motion_adapter is set, but model.path {config.path!r} holds a {pipeline_class}; allowed with a "
            f"{_BASE}; leave the key out"
        )
    pipeline = load_pipeline(config, AnimateDiffPipeline, "AnimateDiff", **options)
    pipeline.register_modules(motion_adapter=None)  # the unet holds its weights
    if pipeline_class == _BASE:  # whose noise levels are others
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_schedule="linear")
    return AnimateDiff(pipeline, config, adapter, sampler, device)


def _motion_adapter(config: Any) -> MotionAdapter:
    path = config.motion_adapter
    if path is None:
        raise UserError(
            f"model.path {config.path!r} holds a {_BASE}, which has no motion modules; set model.motion_adapter to "
            "the folder or hub name of a MotionAdapter, e.g. guoyww/animatediff-motion-adapter-v1-5-2 for Stable "
            "Diffusion 1.5, or model.name: stable_diffusion for pictures"
        )
    try:
        source = place_of("model.motion_adapter", path)
        kind = MotionAdapter.load_config(source).get("_class_name")
        if kind == MotionAdapter.__name__:
            return MotionAdapter.from_pretrained(source, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError, TypeError) as error:
        raise could_not("model.motion_adapter", path, "a MotionAdapter", error) from error
    raise UserError(
        f"model.motion_adapter {path!r} holds a {kind}; allowed: a MotionAdapter, as "
        "`MotionAdapter.save_pretrained(folder)` leaves it"
    )


class AnimateDiff(StableDiffusion):
    """An AnimateDiffPipeline as a function of its adapter's numbers (Guo et al. 2023, arXiv:2307.04725)."""

    frames: int

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if any(re.search(r"motion_modules\.\d+\.proj_(in|out)\.", name) for name in self.parameters.shapes):
            raise UserError(
                "the adapter sits in proj_in or proj_out of a motion module, which diffusers calls as PEFT's layers "
                "cannot be; leave them out of adapter.target_modules, e.g. [to_q, to_k, to_v, to_out.0]"
            )

    def _frames(self, config: Any) -> int:
        most = self.pipeline.unet.config.motion_max_seq_length
        frames = config.num_frames or min(_FRAMES, most)
        if frames > most:
            raise UserError(f"model.num_frames is {frames}; allowed: up to {most} for these motion modules")
        return frames

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        channels, *sides = super()._latent_shape(height, width)
        return channels, self.frames, *sides

    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        inputs = super()._inputs(latents, time, conditioning)
        hidden = inputs["encoder_hidden_states"].repeat_interleave(self.frames, dim=0)  # a video's frames
        return inputs | {"encoder_hidden_states": hidden}

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Videos [B, n, 3, h, w] in [0, 1] of these frames of latents [B, C, F, H, W]; the others are not decoded."""
        chosen = latents if frames is None else latents[:, :, list(frames)]
        pictures = self._in_slices(self._pictures, chosen.transpose(1, 2).flatten(0, 1))
        return pictures.unflatten(0, (len(latents), -1))
