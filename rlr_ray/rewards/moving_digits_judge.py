"""Whether a classifier trained apart from the reward's reads the digit and the direction of the prompt: 1 or 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.rewards.digits import named_digits
from rlr_ray.rewards.moving_digit_classifier import load_classifier
from rlr_ray.rewards.moving_digits import named_directions


class Reward(nn.Module):
    differentiable = False
    video = True

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(MOVING_DIGITS / "judge.safetensors")

    def forward(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        digits, directions = (logits.argmax(-1).cpu() for logits in self.classifier(videos))
        return ((digits == named_digits(prompts)) & (directions == named_directions(prompts))).to(videos)
