"""Log-probability that a small classifier gives to the digit that the prompt names (for the embedded digits model)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError
from rlr_ray.rewards.digit_classifier import WORDS, load_classifier


def named_digits(prompts: Sequence[str]) -> Tensor:  # [B]
    """The digit that each prompt names. Raises UserError for a prompt that names none or several."""
    digits = []
    for prompt in prompts:
        found = [digit for digit, word in enumerate(WORDS) if word in prompt.lower().split()]
        if len(found) != 1:
            raise UserError(
                f"the digits rewards need a prompt that names one digit, found {prompt!r}; allowed words: "
                f"{', '.join(WORDS)}"
            )
        digits.append(found[0])
    return torch.tensor(digits)


class Reward(nn.Module):
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier(DIGITS / "reward.safetensors")

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        digits = named_digits(prompts).to(images.device)
        return self.classifier(images).log_softmax(-1).gather(1, digits[:, None]).squeeze(1)
