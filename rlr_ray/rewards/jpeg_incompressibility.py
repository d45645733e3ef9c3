"""The size of an image as JPEG, a black box: detailed pictures are large (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_ray.rewards.jpeg_compressibility import jpeg_kilobytes


class Reward:
    """Kilobytes."""

    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return jpeg_kilobytes(images)
