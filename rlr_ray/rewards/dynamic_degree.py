"""How much moves in a video: the speed of its fastest pixels, as VBench's dynamic degree looks at (arXiv:2311.17982).

VBench asks whether the fastest 5 % of RAFT's flow exceed a threshold, yes or no; here the speed itself is the score,
and the flow is `optical_flow`'s, so that gradients pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_ray.rewards.optical_flow import flow, grey_frames

_FASTEST = 0.05  # share of the pixels
_STILL = 1e-6  # pixels squared: the root's slope stays finite where nothing moves


class Reward:
    """Percent of the frame's shorter side that the fastest 5 % of pixels move from frame to frame, on average."""

    differentiable = True
    video = True

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        frames = grey_frames(videos, 2, "dynamic_degree")
        moved = flow(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
        speeds = (moved.square().sum(1) + _STILL).sqrt().flatten(1)
        fastest = speeds.topk(max(1, round(_FASTEST * speeds.shape[1])), dim=1).values.mean(1)
        return 100 / min(frames.shape[-2:]) * fastest.unflatten(0, (len(videos), -1)).mean(1)
