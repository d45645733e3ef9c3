"""Rewards that are CLIP's agreement of an image with its prompt, and the frozen CLIP that other rewards share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlr_ray.rewards.hub import Source
from rlr_ray.rewards.images import prepared

CLIP_REPOSITORY = "openai/clip-vit-base-patch32"
_PICKSCORE_REPOSITORY = "yuvalkirstain/PickScore_v1"
_TOKENIZER = "vocab.json or tokenizer.json"


def load_clip(reward: str, path: str, repository: str) -> tuple[Any, Any]:
    """A CLIPModel of transformers and its tokenizer. `path`: a folder, or a repository of the hub."""
    from transformers import AutoTokenizer, CLIPModel

    source = Source(reward, "path", path, repository, ["config.json", "*.safetensors or *.bin", _TOKENIZER])
    place = source.folder or path
    with source.explained():
        return CLIPModel.from_pretrained(place), AutoTokenizer.from_pretrained(place)


def load_tokenizer(reward: str, tokenizer: str, repository: str) -> Any:
    """CLIP's tokenizer alone."""
    from transformers import AutoTokenizer

    source = Source(reward, "tokenizer", tokenizer, repository, [_TOKENIZER])
    place = source.folder or tokenizer
    with source.explained():
        return AutoTokenizer.from_pretrained(place)


class Clip(nn.Module):
    """A frozen CLIPModel of transformers with its tokenizer."""

    prepared: Callable[[Tensor, int], Tensor] = staticmethod(prepared)  # images as the model expects them

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer

    def features(self, images: Tensor) -> Tensor:  # [B, D], of length 1
        """images [B, 3, H, W] in [0, 1]."""
        vision = self.model.vision_model
        pixels = self.prepared(images, vision.config.image_size).to(self.model.logit_scale.dtype)
        features: Tensor = self.model.visual_projection(vision(pixel_values=pixels).pooler_output)
        return functional.normalize(features, dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:  # [B, D], of length 1
        text = self.model.text_model
        longest = text.config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        read: Any = text(**tokens.to(self.model.logit_scale.device)).pooler_output
        return functional.normalize(self.model.text_projection(read), dim=-1)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:  # [B]
        """Cosine of each image with its own prompt."""
        return (self.features(images) * self.text_features(prompts)).sum(-1)


class ClipScore(Clip):
    """2.5 times the cosine (Hessel et al. 2021, arXiv:2104.08718, equation 1).

    The paper also cuts it at 0, where a gradient would end; it seldom is below.
    """

    def __init__(self, path: str = CLIP_REPOSITORY):
        super().__init__(*load_clip("clipscore", path, CLIP_REPOSITORY))

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return 2.5 * self.cosines(images, prompts)


class PickScore(Clip):
    """The model's logit, about 20 (Kirstain et al. 2023, arXiv:2305.01569).

    A difference of 1 means that e times as many people pick the better image.
    """

    def __init__(self, path: str = _PICKSCORE_REPOSITORY):
        super().__init__(*load_clip("pickscore", path, _PICKSCORE_REPOSITORY))

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.model.logit_scale.exp() * self.cosines(images, prompts)
