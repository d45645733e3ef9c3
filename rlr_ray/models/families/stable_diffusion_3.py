"""Stable Diffusion 3 and 3.5, from a local folder or the hub: flow matching, with the SDE sampler of Flow-GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError
from rlr_ray.models.loading import load_pipeline
from rlr_ray.models.pipelines import PipelineModel
from rlr_ray.models.schedulers import flow_schedule_of

_TOKENS = 256  # that T5 is given, as in the pipeline


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any) -> StableDiffusion3:
    """The pipeline at `config.path` (a folder or a hub name) with its adapter."""
    pipeline = load_pipeline(config, StableDiffusion3Pipeline, "Stable Diffusion 3 or 3.5")
    return StableDiffusion3(pipeline, config, adapter, sampler, device)


class StableDiffusion3(PipelineModel):
    """A StableDiffusion3Pipeline as a function of its adapter's numbers (Esser et al. 2024, arXiv:2403.03206).

    The pipeline may lack its third text encoder, T5: saved with `text_encoder_3=None, tokenizer_3=None`.
    """

    trained = "transformer"
    embeddings = ("prompt", "negative", "pooled", "negative_pooled")

    @property
    def tokens(self) -> int:
        tokenizer = self.pipeline.tokenizer_3
        return _TOKENS if tokenizer is None else min(_TOKENS, tokenizer.model_max_length)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.pipeline.transformer.config.patch_size)

    @property
    def default_sides(self) -> tuple[int, int]:
        side = int(self.pipeline.default_sample_size)
        return side, side

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        shape = super()._latent_shape(height, width)
        largest = self.pipeline.transformer.config.pos_embed_max_size * self.patch
        for name, side in zip(("height", "width"), shape[1:], strict=True):
            if side > largest:
                scale = self.pipeline.vae_scale_factor
                raise UserError(f"model.{name} is {side * scale}; allowed: up to {largest * scale} for this model")
        return shape

    def _schedule(self, sampler: Any) -> Schedule:
        _, height, width = self.latent_shape
        tokens = (height // self.patch) * (width // self.patch)
        return flow_schedule_of(self.pipeline.scheduler, sampler, tokens)

    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": time.expand(len(latents)),
            "encoder_hidden_states": self._both(conditioning, "negative", "prompt"),
            "pooled_projections": self._both(conditioning, "negative_pooled", "pooled"),
        }

    def _encoded(self, prompt: str, negative: str) -> Sequence[Tensor | None]:
        encoded: Sequence[Tensor | None] = self.pipeline.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=self.guidance_scale > 1,
            negative_prompt=negative,
            max_sequence_length=self.tokens,
        )
        return encoded

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """T5 reads what CLIP's tokenizers cut off, if the pipeline has it."""
        if self.pipeline.text_encoder_3 is None:
            return super()._tokenizers()
        return [(self.pipeline.tokenizer_3, self.tokens)]
