"""The embedded model: a small Stable Diffusion pipeline that writes digits (rlr_ray/assets/digits/README.md)."""

from __future__ import annotations

from typing import Any

import torch

from rlr_ray.assets import DIGITS
from rlr_ray.models.families import stable_diffusion


def load(config: Any, adapter: Any, sampler: Any, device: torch.device) -> stable_diffusion.StableDiffusion:
    embedded = config.model_copy(update={"path": str(DIGITS / "pipeline")})
    return stable_diffusion.load(embedded, adapter, sampler, device)
