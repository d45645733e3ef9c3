"""LAION's aesthetic score: what people would rate an image from 1 to 10, whatever its prompt (Schuhmann 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.clip import Clip, load_clip
from rlr_ray.rewards.hub import Source, linear_head
from rlr_ray.utils.environment import path_of

_REPOSITORY = "openai/clip-vit-large-patch14"
_HEAD_REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"


class Aesthetic(Clip):
    """`path`: CLIP ViT-L/14. `head`: a file with the linear layers' weights, or a repository of the hub."""

    def __init__(self, path: str = _REPOSITORY, head: str = _HEAD_REPOSITORY):
        super().__init__(*load_clip("aesthetic", path, _REPOSITORY))
        source, file = Source("aesthetic", "head", head, _HEAD_REPOSITORY, ["*.pth"]), path_of(head)
        if not file.is_file():
            folder = source.fetched()
            file, *others = folder.glob("*.pth")
            if others:
                raise UserError(
                    f"reward 'aesthetic': {folder} holds {1 + len(others)} files *.pth; set reward.options.head to one"
                )
        with source.explained():
            self.head = linear_head(source.weights(file)).requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.head(self.features(images)).squeeze(1)
