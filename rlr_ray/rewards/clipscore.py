"""CLIPScore: how well an image agrees with its prompt (Hessel et al. 2021, arXiv:2104.08718, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_ray.rewards.clip import Clip, load_clip

_REPOSITORY = "openai/clip-vit-base-patch32"
_WEIGHT = 2.5


class Reward(Clip):
    """2.5 times the cosine. The paper also cuts it at 0, where a gradient would end; it seldom is below."""

    differentiable = True

    def __init__(self, path: str = _REPOSITORY):
        super().__init__(*load_clip("clipscore", path, _REPOSITORY))

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return _WEIGHT * self.cosines(images, prompts)
