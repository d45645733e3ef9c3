"""The size of an image as JPEG, a black box (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_ray.rewards.images import pictures

_QUALITY = 95


class JpegIncompressibility:
    """Kilobytes as Pillow writes them at quality 95: detailed pictures are large."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        sizes = []
        for picture in pictures(images):
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=_QUALITY)
            sizes.append(len(file.getvalue()) / 1000)
        return torch.tensor(sizes)


class JpegCompressibility(JpegIncompressibility):
    """Minus kilobytes: smooth pictures are small."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return -super().__call__(images, prompts, metadata)
