"""Rewards that only benches have: noisy, of 0 and 1, and of a classifier of another architecture."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import ROOT
from rlr_ray.rewards.digits import WORDS, Digits, load_classifier, named

FOLDER = ROOT / "build" / "problems"  # what bench/problems/build.py leaves


class OtherClassifier(nn.Module):
    """Images [B, 3, 16, 16] in [0, 1] to logits [B, 10]: strided 5 x 5 convolutions and a hidden layer."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 64),
            nn.SiLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.mean(1, keepdim=True) * 2 - 1)


class OtherDigits(nn.Module):
    """Log-probability of the digit that the prompt names, by the classifier of the early-stopped pipeline's problem."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(OtherClassifier, FOLDER / "early" / "reward.safetensors")

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        asked = named("digit", WORDS, prompts).to(images.device)
        return self.classifier(images).log_softmax(-1).gather(1, asked[:, None]).squeeze(1)


class RightOrWrong(Digits):
    """1 if the digit that the prompt names is the likeliest by the reward's classifier, else 0."""

    differentiable = False

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        asked = named("digit", WORDS, prompts).to(images.device)
        return (self.classifier(images).argmax(-1) == asked).to(images)


class NoisyDigits(Digits):
    """The log-probability with noise N(0, deviation^2) added, which follows from the picture: asked again, the same."""

    differentiable = False

    def __init__(self, deviation: float = 2.0) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        scores = super().forward(images, prompts, metadata)
        return scores + self.deviation * noise_of(images)


def noise_of(images: Tensor) -> Tensor:  # [B]
    """N(0, 1), a function of each picture's bits as 8-bit pixels."""
    rows = (images.detach() * 255).round().to(torch.uint8).cpu().flatten(1)
    sources = [torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes())) for row in rows]
    draws = [torch.randn((), generator=source) for source in sources]
    return torch.stack(draws).to(images)
