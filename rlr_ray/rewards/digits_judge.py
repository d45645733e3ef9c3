"""Whether a classifier trained apart from the reward's reads the digit that the prompt names: 1 or 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlr_ray.assets import DIGITS
from rlr_ray.rewards.digit_classifier import load_classifier
from rlr_ray.rewards.digits import named_digits


class Reward(nn.Module):
    differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(DIGITS / "judge.safetensors")

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return (self.classifier(images).argmax(-1).cpu() == named_digits(prompts)).to(images)
