"""Minus the size of an image as JPEG, a black box: smooth pictures are small (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_ray.rewards.images import pictures

_QUALITY = 95


class Reward:
    """Minus kilobytes."""

    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return -jpeg_kilobytes(images)


def jpeg_kilobytes(images: Tensor) -> Tensor:  # [B]
    """Of each image as Pillow writes it at quality 95."""
    sizes = []
    for picture in pictures(images):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=_QUALITY)
        sizes.append(len(file.getvalue()) / 1000)
    return torch.tensor(sizes)
