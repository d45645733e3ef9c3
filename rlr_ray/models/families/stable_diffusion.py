"""Stable Diffusion 1.x and 2.x, from a local folder or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rlr_ray.core.schedule import Schedule
from rlr_ray.models.loading import load_pipeline
from rlr_ray.models.pipelines import PipelineModel
from rlr_ray.models.schedulers import ddim_scheduler, schedule_of
from rlr_ray.models.solvers import refuse_other_kind


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any) -> StableDiffusion:
    """The pipeline at `config.path` (a folder or a hub name) with its adapter."""
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = load_pipeline(config, StableDiffusionPipeline, "Stable Diffusion 1.x or 2.x", **options)
    return StableDiffusion(pipeline, config, adapter, sampler, device)


class StableDiffusion(PipelineModel):
    """A StableDiffusionPipeline as a function of its adapter's numbers; its sampler is DDIM."""

    trained = "unet"

    @property
    def default_sides(self) -> tuple[int, int]:
        side = int(self.pipeline.unet.config.sample_size)
        return side, side

    def _schedule(self, sampler: Any) -> Schedule:
        refuse_other_kind(self.pipeline.scheduler, "ddim")
        scheduler = ddim_scheduler(self.pipeline.scheduler.config, sampler.timestep_spacing)
        return schedule_of(scheduler, sampler.steps, sampler.eta)

    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        hidden = self._both(conditioning, "negative", "prompt")
        return {"sample": latents, "timestep": time, "encoder_hidden_states": hidden}

    def _encoded(self, prompt: str, negative: str) -> Sequence[Tensor | None]:
        guided = self.guidance_scale > 1
        encoded: Sequence[Tensor | None] = self.pipeline.encode_prompt(
            prompt, self.device, 1, guided, negative_prompt=negative or None
        )
        return encoded
