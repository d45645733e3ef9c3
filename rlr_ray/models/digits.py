"""The embedded model: a small Stable Diffusion pipeline that writes digits (rlr_ray/assets/digits/README.md)."""

from __future__ import annotations

from typing import Any

import torch

from rlr_ray.assets import DIGITS
from rlr_ray.models.stable_diffusion import StableDiffusion, load_pipeline


def load(config: Any, adapter: Any, sampler: Any, device: torch.device) -> StableDiffusion:
    pipeline = load_pipeline(str(DIGITS / "pipeline"), getattr(torch, config.dtype))
    return StableDiffusion(pipeline, config, adapter, sampler, device)
