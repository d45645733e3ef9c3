"""PickScore: which image people pick for a prompt (Kirstain et al. 2023, arXiv:2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_ray.rewards.clip import Clip, load_clip

_REPOSITORY = "yuvalkirstain/PickScore_v1"


class Reward(Clip):
    """The model's logit, about 20; a difference of 1 means that e times as many people pick the better image."""

    differentiable = True

    def __init__(self, path: str = _REPOSITORY):
        super().__init__(*load_clip("pickscore", path, _REPOSITORY))

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.model.logit_scale.exp() * self.cosines(images, prompts)
