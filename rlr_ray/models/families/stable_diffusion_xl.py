"""Stable Diffusion XL, from a local folder or the hub: two text encoders, and the picture's size as conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from rlr_ray.models.families.stable_diffusion import StableDiffusion
from rlr_ray.models.loading import load_pipeline


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any) -> StableDiffusionXL:
    """The pipeline at `config.path` (a folder or a hub name) with its adapter."""
    pipeline = load_pipeline(config, StableDiffusionXLPipeline, "Stable Diffusion XL", add_watermarker=False)
    return StableDiffusionXL(pipeline, config, adapter, sampler, device)


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline as a function of its adapter's numbers (Podell et al. 2023, arXiv:2307.01952).

    Pictures are asked for at the size at which they are drawn, not cropped. A VAE that float16 overflows stays float32.
    """

    embeddings = ("prompt", "negative", "pooled", "negative_pooled")

    def __init__(self, pipeline: StableDiffusionXLPipeline, *arguments: Any):
        if pipeline.vae.config.force_upcast and pipeline.vae.dtype == torch.float16:
            pipeline.vae.to(torch.float32)
        super().__init__(pipeline, *arguments)
        height, width = (pipeline.vae_scale_factor * side for side in self.latent_shape[1:])
        self._sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=self.device)

    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        pooled = self._both(conditioning, "negative_pooled", "pooled")
        added = {"text_embeds": pooled, "time_ids": self._sizes.expand(len(pooled), -1)}
        return super()._inputs(latents, time, conditioning) | {"added_cond_kwargs": added}

    def _encoded(self, prompt: str, negative: str) -> Sequence[Tensor | None]:
        encoded: Sequence[Tensor | None] = self.pipeline.encode_prompt(
            prompt,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.guidance_scale > 1,
            negative_prompt=negative or None,  # not the same: without one, it may be 0 (force_zeros_for_empty_prompt)
        )
        return encoded
