"""How smoothly a video moves: how well each frame lies between its neighbours, as VBench asks (arXiv:2311.17982).

VBench interpolates by a network (AMT); here both neighbours are moved half of the way of the optical flow between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_ray.rewards.optical_flow import flow, grey_frames, warped


class Reward:
    """1 less the mean absolute difference of brightness. A still video has 1 as well: mix it with `dynamic_degree`."""

    differentiable = True
    video = True

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        frames = grey_frames(videos, 3, "motion_smoothness")
        before, own, after = (part.flatten(0, 1) for part in (frames[:, :-2], frames[:, 1:-1], frames[:, 2:]))
        half = flow(before, after) / 2
        between = (warped(before.unsqueeze(1), -half) + warped(after.unsqueeze(1), half)) / 2
        wrong = (between.squeeze(1) - own).abs().mean((1, 2))
        return 1 - wrong.unflatten(0, (len(videos), -1)).mean(1)
