"""Log-probability that a small classifier gives to the digit and to the direction that the prompt names.

For the embedded model of moving digits; the two log-probabilities are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.errors import UserError
from rlr_ray.rewards.digits import named_digits
from rlr_ray.rewards.moving_digit_classifier import DIRECTIONS, load_classifier


def named_directions(prompts: Sequence[str]) -> Tensor:  # [B], indices of DIRECTIONS
    """The direction that each prompt names. Raises UserError for a prompt that names none or several."""
    directions = []
    for prompt in prompts:
        found = [index for index, word in enumerate(DIRECTIONS) if word in prompt.lower().split()]
        if len(found) != 1:
            raise UserError(
                f"the moving digits rewards need a prompt that names one direction, found {prompt!r}; allowed words: "
                f"{', '.join(DIRECTIONS)}"
            )
        directions.append(found[0])
    return torch.tensor(directions)


class Reward(nn.Module):
    differentiable = True
    video = True

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(MOVING_DIGITS / "reward.safetensors")

    def forward(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        named = (named_digits(prompts), named_directions(prompts))
        scores = [
            logits.log_softmax(-1).gather(1, right.to(videos.device)[:, None]).squeeze(1)
            for logits, right in zip(self.classifier(videos), named, strict=True)
        ]
        return scores[0] + scores[1]
