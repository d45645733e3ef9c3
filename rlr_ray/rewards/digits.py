"""Rewards of the embedded digits model: two small classifiers of handwritten digits, to train on and to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Classifier = TypeVar("Classifier", bound=nn.Module)


class DigitClassifier(nn.Module):
    """Images [B, 3, 16, 16] in [0, 1] to logits [B, 10]. Smooth everywhere, so that its gradients inform."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(4 * width * 16, 10),
        )

    def features(self, images: Tensor) -> Tensor:  # [B, D], of the layer before the last
        grey = images.mean(1, keepdim=True) * 2 - 1
        return self.layers[:-1](grey)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers[-1](self.features(images))


def load_classifier(kind: type[Classifier], path: Path) -> Classifier:
    """A frozen float32 classifier from a safetensors file."""
    weights = {name: value.to(torch.float32) for name, value in load_file(path).items()}
    classifier = kind(width=len(weights["layers.0.bias"]))
    classifier.load_state_dict(weights)
    return classifier.requires_grad_(False).eval()


def enlarged(small: Tensor) -> Tensor:  # [N, 3, 16, 16]
    """scikit-learn's pictures [N, 8, 8] in [0, 1] as the model was trained on them."""
    images = F.interpolate(small[:, None], size=16, mode="bicubic", align_corners=False).clamp(0, 1)
    return images.expand(-1, 3, -1, -1).contiguous()


def real_digits() -> tuple[Tensor, Tensor]:
    """Images [N, 3, 16, 16] in [0, 1] of real digits that no classifier here was trained on, and which they are [N]."""
    real = load_file(DIGITS / "real.safetensors")
    return enlarged(real["images"] / 16), real["labels"].long()


def named(kind: str, words: Sequence[str], prompts: Sequence[str]) -> Tensor:  # [B], indices of words
    """The word that each prompt names. Raises UserError for a prompt that names none or several."""
    indices = []
    for prompt in prompts:
        there = [index for index, word in enumerate(words) if word in prompt.lower().split()]
        if len(there) != 1:
            raise UserError(
                f"the rewards of digits need a prompt that names one {kind}, found {prompt!r}; allowed words: "
                f"{', '.join(words)}"
            )
        indices.append(there[0])
    return torch.tensor(indices)


class Digits(nn.Module):
    """Log-probability of the digit that the prompt names."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(DigitClassifier, DIGITS / "reward.safetensors")
        self.features = self.classifier.features

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        digits = named("digit", WORDS, prompts).to(images.device)
        return self.classifier(images).log_softmax(-1).gather(1, digits[:, None]).squeeze(1)


class DigitsJudge(nn.Module):
    """Whether a classifier trained apart from the reward's reads the digit that the prompt names: 1 or 0."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(DigitClassifier, DIGITS / "judge.safetensors")
        self.features = self.classifier.features

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return (self.classifier(images).argmax(-1).cpu() == named("digit", WORDS, prompts)).to(images)
