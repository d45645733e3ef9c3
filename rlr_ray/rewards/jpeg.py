"""The size of an image as JPEG, a black box: small files are smooth pictures (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rlr_ray.rewards.pixels import pictures

_QUALITY = 95


class Reward:
    """Minus kilobytes; with `incompressible` plus kilobytes."""

    differentiable = False

    def __init__(self, incompressible: bool = False):
        self.sign = 1.0 if incompressible else -1.0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return torch.tensor([self.sign * _kilobytes(picture) for picture in pictures(images)])


def _kilobytes(picture: Image.Image) -> float:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY)
    return len(file.getvalue()) / 1000
