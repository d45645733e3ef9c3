"""A small convolutional classifier of handwritten digits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True) * 2 - 1
        return self.layers(grey)


def load_classifier(path: Path) -> DigitClassifier:
    """A frozen float32 classifier from a safetensors file."""
    weights = {name: value.to(torch.float32) for name, value in load_file(path).items()}
    classifier = DigitClassifier(width=len(weights["layers.0.bias"]))
    classifier.load_state_dict(weights)
    return classifier.requires_grad_(False).eval()
