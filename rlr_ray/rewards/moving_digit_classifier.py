"""A small convolutional classifier of moving digits: which digit, and which way it goes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_ray.errors import UserError
from rlr_ray.rewards.digit_classifier import WORDS

DIRECTIONS = ("left", "right", "up", "down")
STILL = len(DIRECTIONS)  # a fifth kind of motion, else a digit that stays would be as good as a guessed direction
FRAMES, SIZE = 8, 16


class VideoClassifier(nn.Module):
    """Videos [B, 8, 3, 16, 16] in [0, 1] to logits of the digit [B, 10] and of the motion [B, 5]. Smooth.

    Motion is an index of DIRECTIONS, or STILL.
    """

    def __init__(self, width: int = 12):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, width, (1, 3, 3), padding=(0, 1, 1)),
            nn.GELU(),
            nn.AvgPool3d((1, 2, 2)),
            nn.Conv3d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.AvgPool3d(2),
            nn.Conv3d(2 * width, 4 * width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(4 * width * 64, len(WORDS) + STILL + 1),
        )

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        found = tuple(videos.shape)
        if found[1:] != (FRAMES, 3, SIZE, SIZE):
            raise UserError(
                f"the moving digits rewards take videos shaped [B, {FRAMES}, 3, {SIZE}, {SIZE}], found {list(found)}; "
                f"set model.num_frames to {FRAMES} and use a model of {SIZE} x {SIZE} pixels, such as moving_digits"
            )
        grey = videos.mean(2)[:, None] * 2 - 1  # [B, 1, 8, 16, 16]
        digits, motions = self.layers(grey).split([len(WORDS), STILL + 1], 1)
        return digits, motions


def load_classifier(path: Path) -> VideoClassifier:
    """A frozen float32 classifier from a safetensors file."""
    weights = {name: value.to(torch.float32) for name, value in load_file(path).items()}
    classifier = VideoClassifier(width=len(weights["layers.0.bias"]))
    classifier.load_state_dict(weights)
    return classifier.requires_grad_(False).eval()
