"""CLIP's agreement of images with prompts, which several rewards share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlr_ray.errors import UserError
from rlr_ray.rewards.pixels import prepared


def load_clip(path: str, reward: str) -> tuple[Any, Any]:
    """A CLIPModel of transformers and its tokenizer. `path`: a folder, or a repository of the hub."""
    from transformers import CLIPModel

    with _explained(path, reward):
        return CLIPModel.from_pretrained(_place(path)), load_tokenizer(path, reward)


def load_tokenizer(path: str, reward: str) -> Any:
    from transformers import AutoTokenizer

    with _explained(path, reward):
        return AutoTokenizer.from_pretrained(_place(path))


def _place(path: str) -> str | Path:
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else path


@contextmanager
def _explained(path: str, reward: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"reward {reward!r}: {path!r} gave no CLIP model of transformers ({why}); see docs/rewards.md, or on a "
            f"machine with a network run `hf download {path}` and set reward.options.path to the folder"
        ) from error


class Clip(nn.Module):
    """A frozen CLIPModel of transformers with its tokenizer."""

    prepared: Callable[[Tensor, int], Tensor] = staticmethod(prepared)  # images as the model expects them

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer

    def image_features(self, images: Tensor) -> Tensor:  # [B, D], of length 1
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
        """Of each image with its own prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)
