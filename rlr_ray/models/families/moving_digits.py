"""The embedded video model: a small AnimateDiff pipeline of moving digits (rlr_ray/assets/moving_digits/README.md)."""

from __future__ import annotations

from typing import Any

import torch

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.models.families import animatediff


def load(config: Any, adapter: Any, sampler: Any, device: torch.device) -> animatediff.AnimateDiff:
    embedded = config.model_copy(update={"path": str(MOVING_DIGITS / "pipeline")})
    return animatediff.load(embedded, adapter, sampler, device)
