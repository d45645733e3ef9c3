"""FLUX.1 dev and schnell, from a local folder or the hub: flow matching, with the SDE sampler of Flow-GRPO."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from diffusers import FluxPipeline
from torch import Tensor

from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError
from rlr_ray.models.loading import load_pipeline
from rlr_ray.models.pipelines import PipelineModel
from rlr_ray.models.schedulers import flow_schedule_of

logger = logging.getLogger(__name__)
_EMBEDDED = 3.5  # guidance_scale of the pipeline's own call


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any) -> Flux:
    """The pipeline at `config.path` (a folder or a hub name) with its adapter."""
    return Flux(load_pipeline(config, FluxPipeline, "FLUX.1"), config, adapter, sampler, device)


class Flux(PipelineModel):
    """A FluxPipeline as a function of its adapter's numbers.

    The chain's latent is the VAE's [B, C, H, W], in which the pipeline draws its noise too; the transformer is given
    it packed, 2 x 2 latent pixels a token. `embedded_guidance_scale` is the pipeline's `guidance_scale`, which dev is
    told as an input; `guidance_scale` is its `true_cfg_scale`: classifier-free, for negative prompts.
    """

    trained = "transformer"
    embeddings = ("prompt", "pooled", "negative", "negative_pooled")
    patch = 2

    def __init__(self, pipeline: FluxPipeline, config: Any, adapter: Any, sampler: Any, device: torch.device):
        super().__init__(pipeline, config, adapter, sampler, device)
        embeds = pipeline.transformer.config.guidance_embeds
        self.embedded_guidance_scale = self._embedded_guidance(sampler) if embeds else None
        if sampler.embedded_guidance_scale is not None and not embeds:
            raise UserError(
                f"sampler.embedded_guidance_scale is {sampler.embedded_guidance_scale:g}, but this model takes none "
                "(its transformer has no guidance_embeds, as FLUX.1 schnell); leave the key out"
            )
        _, height, width = self.latent_shape
        self._places = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, self.dtype)

    @property
    def tokens(self) -> int:
        """That T5 is given; schnell takes fewer."""
        embeds = self.pipeline.transformer.config.guidance_embeds
        return min(512 if embeds else 256, self.pipeline.tokenizer_2.model_max_length)

    def _embedded_guidance(self, sampler: Any) -> float:
        if self.guidance_scale > 1:
            logger.warning(
                f"sampler.guidance_scale {self.guidance_scale:g} adds classifier-free guidance, at twice the cost, to "
                "a model with guidance of its own; set it to 1 unless prompts have negative ones"
            )
        return _EMBEDDED if sampler.embedded_guidance_scale is None else float(sampler.embedded_guidance_scale)

    @property
    def channels(self) -> int:
        return int(self.pipeline.transformer.config.in_channels) // 4

    @property
    def default_sides(self) -> tuple[int, int]:
        side = int(self.pipeline.default_sample_size)
        return side, side

    def _schedule(self, sampler: Any) -> Schedule:
        _, height, width = self.latent_shape
        sigmas = numpy.linspace(1.0, 1 / sampler.steps, sampler.steps)  # as the pipeline has them
        return flow_schedule_of(self.pipeline.scheduler, sampler, (height // 2) * (width // 2), sigmas.tolist())

    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        prompt, count = self._both(conditioning, "negative", "prompt"), len(latents)
        scale = self.embedded_guidance_scale
        return {
            "hidden_states": self.pipeline._pack_latents(latents, count, *self.latent_shape),
            "timestep": time.expand(count) / 1000,
            "guidance": None if scale is None else torch.full((count,), scale, device=self.device),
            "encoder_hidden_states": prompt,
            "pooled_projections": self._both(conditioning, "negative_pooled", "pooled"),
            "txt_ids": torch.zeros(prompt.shape[1], 3, device=self.device, dtype=self.dtype),
            "img_ids": self._places,
        }

    def _output(self, output: Tensor) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        height, width = (side * scale for side in self.latent_shape[1:])
        unpacked: Tensor = self.pipeline._unpack_latents(output, height, width, scale)
        return unpacked

    def _encoded(self, prompt: str, negative: str) -> Sequence[Tensor | None]:
        options = {"device": self.device, "max_sequence_length": self.tokens}
        negatives = self.pipeline.encode_prompt(negative, **options)[:2] if self.guidance_scale > 1 else (None, None)
        return *self.pipeline.encode_prompt(prompt, **options)[:2], *negatives

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """T5 reads what CLIP's tokenizer cuts off."""
        return [(self.pipeline.tokenizer_2, self.tokens)]
