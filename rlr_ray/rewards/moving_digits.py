"""Rewards of the embedded model of moving digits: which digit a video shows, and which way it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.errors import UserError
from rlr_ray.rewards.digits import WORDS, load_classifier, named

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

    def features(self, videos: Tensor) -> Tensor:  # [B, D], of the layer before the last
        if videos.shape[1:] != (FRAMES, 3, SIZE, SIZE):
            raise UserError(
                f"the moving digits rewards take videos shaped [B, {FRAMES}, 3, {SIZE}, {SIZE}], found "
                f"{list(videos.shape)}; set model.num_frames to {FRAMES} and use a model of {SIZE} x {SIZE} pixels, "
                "such as moving_digits"
            )
        grey = videos.mean(2)[:, None] * 2 - 1  # [B, 1, 8, 16, 16]
        return self.layers[:-1](grey)

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        digits, motions = self.layers[-1](self.features(videos)).split([len(WORDS), STILL + 1], 1)
        return digits, motions


class MovingDigits(nn.Module):
    """Sum of the log-probabilities of the digit and of the direction that the prompt names."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(VideoClassifier, MOVING_DIGITS / "reward.safetensors")
        self.features = self.classifier.features

    def forward(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        asked = named("digit", WORDS, prompts), named("direction", DIRECTIONS, prompts)
        digit, direction = (
            logits.log_softmax(-1).gather(1, right.to(videos.device)[:, None]).squeeze(1)
            for logits, right in zip(self.classifier(videos), asked, strict=True)
        )
        return digit + direction


class MovingDigitsJudge(nn.Module):
    """Whether a classifier trained apart from the reward's reads digit and direction of the prompt: 1 or 0."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(VideoClassifier, MOVING_DIGITS / "judge.safetensors")
        self.features = self.classifier.features

    def forward(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        digits, directions = (logits.argmax(-1).cpu() for logits in self.classifier(videos))
        right = (digits == named("digit", WORDS, prompts)) & (directions == named("direction", DIRECTIONS, prompts))
        return right.to(videos)
