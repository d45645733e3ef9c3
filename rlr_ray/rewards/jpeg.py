"""The size of an image as JPEG, a black box: small files are smooth pictures (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_QUALITY = 95


class Reward:
    """Minus kilobytes; with `incompressible` plus kilobytes."""

    differentiable = False

    def __init__(self, incompressible: bool = False):
        self.sign = 1.0 if incompressible else -1.0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self.sign * _kilobytes(Image.fromarray(picture)) for picture in pixels])


def _kilobytes(picture: Image.Image) -> float:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY)
    return len(file.getvalue()) / 1000
