"""Wan, text to video, from a local folder or the hub: flow matching, with the SDE sampler of Flow-GRPO.

F latent frames, n frames of a video: the causal VAE makes one of the first latent frame and r of each other, r = 4, so
n = r (F - 1) + 1, and frame i depends on the latent frames up to i / r, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlr_ray.core.sampler import Conditioning
from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError
from rlr_ray.models.loading import load_pipeline, pipeline_index
from rlr_ray.models.pipelines import PipelineModel
from rlr_ray.models.schedulers import own_flow_schedule

_FRAMES, _HEIGHT, _WIDTH = 81, 480, 832  # of the pipeline's own call
_TOKENS = 512  # that UMT5 is given there


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any) -> Wan:
    """The pipeline at `config.path` (a folder or a hub name) with its adapter."""
    index = pipeline_index(config, WanPipeline, "Wan")
    if index.get("transformer_2", [None, None]) != [None, None]:
        raise UserError(
            f"model.path {config.path!r} holds a Wan pipeline of two transformers, as Wan 2.2 A14B is, and an adapter "
            "sits in one; allowed: pipelines of one, as Wan 2.1 T2V and Wan 2.2 TI2V-5B are; set "
            "model.name: pipeline, which has one in each"
        )
    return Wan(load_pipeline(config, WanPipeline, "Wan"), config, adapter, sampler, device)


class Wan(PipelineModel):
    """A WanPipeline of one transformer as a function of its adapter's numbers (arXiv:2503.20314)."""

    trained = "transformer"
    frames: int

    def __init__(self, pipeline: WanPipeline, config: Any, adapter: Any, sampler: Any, device: torch.device):
        super().__init__(pipeline, config, adapter, sampler, device)
        if self.decode_slice is not None:
            pipeline.vae.decoder.forward = _by_latent_frame(pipeline.vae.decoder.forward)

    @property
    def tokens(self) -> int:
        return min(_TOKENS, self.pipeline.tokenizer.model_max_length)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return math.lcm(*self.pipeline.transformer.config.patch_size[1:])

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_scale_factor_spatial)

    @property
    def default_sides(self) -> tuple[int, int]:
        return _HEIGHT // self.scale, _WIDTH // self.scale

    @property
    def rate(self) -> int:
        """Frames that the VAE makes of a latent frame, r."""
        return int(self.pipeline.vae_scale_factor_temporal)

    def _frames(self, config: Any) -> int:
        if config.motion_adapter is not None:
            raise UserError(f"model.motion_adapter is set, but {config.name!r} takes none; leave the key out")
        frames = config.num_frames or _FRAMES
        if (frames - 1) % self.rate:
            below = frames - (frames - 1) % self.rate
            near = " or ".join(str(n) for n in (below, below + self.rate) if n > 1)
            raise UserError(
                f"model.num_frames is {frames}; allowed: 1 more than a multiple of {self.rate} for this model, {near}"
            )
        return frames

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        channels, *sides = super()._latent_shape(height, width)
        return channels, (self.frames - 1) // self.rate + 1, *sides

    def _schedule(self, sampler: Any) -> Schedule:
        return own_flow_schedule(self.pipeline.scheduler, sampler)

    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": time.expand(len(latents)),  # `expand_timesteps` of Wan 2.2 says the same for every token
            "encoder_hidden_states": self._both(conditioning, "negative", "prompt"),
        }

    def _encoded(self, prompt: str, negative: str) -> Sequence[Tensor | None]:
        guided, options = self.guidance_scale > 1, {"max_sequence_length": self.tokens, "device": self.device}
        encoded: Sequence[Tensor | None] = self.pipeline.encode_prompt(prompt, negative, guided, **options)
        return encoded

    def _tokenizers(self) -> list[tuple[Any, int]]:
        return [(self.pipeline.tokenizer, self.tokens)]

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Videos [B, n, 3, h, w] in [0, 1] of these frames of latents [B, C, F, H, W]; decoded up to their last."""
        if frames is None:
            return self._in_slices(self._videos, latents)
        needed = math.ceil(max(frames) / self.rate) + 1
        return self._in_slices(self._videos, latents[:, :, :needed])[:, list(frames)]

    def _videos(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            latents.new_tensor(values)[:, None, None, None]
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        videos = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return (videos.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def _by_latent_frame(decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The VAE's decoder, called once a latent frame, which computes that frame again for its gradient.

    It finds in `feat_cache` what earlier calls left there, and puts its own in place of it.
    """

    def forward(x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool = False) -> Tensor:
        def pure(x: Tensor, *before: Any) -> tuple[Any, ...]:
            after = list(before)
            return decode(x, feat_cache=after, feat_idx=[0], first_chunk=first_chunk), *after

        frame, *feat_cache[:] = checkpoint(pure, x, *feat_cache, use_reentrant=False, preserve_rng_state=False)
        return frame

    return forward
