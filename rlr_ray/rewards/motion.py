"""Motion in videos, after VBench's dimensions of these names (arXiv:2311.17982), not with its networks.

The optical flow is Lucas and Kanade's (1981), from coarse to fine, in torch, so that gradients pass. B videos of F
frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, grid_sample, interpolate, pad

from rlr_ray.errors import UserError

_SIDE = 64  # pixels that a frame's shorter side is reduced to
_COARSEST = 8  # pixels of the shorter side on the coarsest level
_WINDOW = 5  # pixels a side, over which the flow is taken as one
_TWICE = 2  # times the flow of a level is corrected
_RIDGE = 1e-3  # added to the squared gradients: where there is no texture the flow is 0
_FASTEST = 0.05  # share of the pixels
_STILL = 1e-6  # pixels squared: the root's slope stays finite where nothing moves


class DynamicDegree:
    """Percent of the frame's shorter side that the fastest 5 % of pixels move from frame to frame, on average.

    VBench asks whether the fastest 5 % of RAFT's flow exceed a threshold, yes or no; here the speed is the score.
    """

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        frames = grey_frames(videos, 2, "dynamic_degree")
        moved = flow(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
        speeds = (moved.square().sum(1) + _STILL).sqrt().flatten(1)
        fastest = speeds.topk(max(1, round(_FASTEST * speeds.shape[1])), dim=1).values.mean(1)
        return 100 / min(frames.shape[-2:]) * fastest.unflatten(0, (len(videos), -1)).mean(1)


class MotionSmoothness:
    """1 less the mean absolute difference of brightness between each frame and the one that its neighbours imply.

    VBench interpolates by a network (AMT); here both neighbours are moved half of the way of the optical flow between
    them. A still video has 1 as well: mix it with `dynamic_degree`.
    """

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        frames = grey_frames(videos, 3, "motion_smoothness")
        before, middle, after = (part.flatten(0, 1) for part in (frames[:, :-2], frames[:, 1:-1], frames[:, 2:]))
        half = flow(before, after) / 2
        between = (warped(before.unsqueeze(1), -half) + warped(after.unsqueeze(1), half)) / 2
        wrong = (between.squeeze(1) - middle).abs().mean((1, 2))
        return 1 - wrong.unflatten(0, (len(videos), -1)).mean(1)


def grey_frames(videos: Tensor, least: int, name: str) -> Tensor:  # [B, F, 3, H, W] in [0, 1] -> [B, F, H', W']
    """Brightness, the shorter side reduced to 64 pixels at most. Raises UserError if there are too few frames."""
    if videos.shape[1] < least:
        raise UserError(
            f"reward {name!r} sees {videos.shape[1]} frames of a video; allowed: {least} or more; raise its `frames`"
        )
    grey = videos.mean(2)
    factor = _SIDE / min(grey.shape[-2:])
    if factor >= 1:
        return grey
    return interpolate(grey, scale_factor=factor, mode="bilinear", antialias=True)


def flow(first: Tensor, second: Tensor) -> Tensor:  # [N, H, W], [N, H, W] -> [N, 2, H, W]
    """Displacement of each pixel of `first` in `second`, in pixels to the right and down."""
    levels = [(first.unsqueeze(1), second.unsqueeze(1))]
    while min(levels[-1][0].shape[-2:]) >= 2 * _COARSEST:
        one, other = levels[-1]
        levels.append((avg_pool2d(one, 2), avg_pool2d(other, 2)))
    moved = first.new_zeros(len(first), 2, *levels[-1][0].shape[-2:])
    for one, other in reversed(levels):
        size = one.shape[-2:]
        if moved.shape[-2:] != size:
            moved = 2 * interpolate(moved, size, mode="bilinear")
        for _ in range(_TWICE):
            moved = moved + _correction(one, warped(other, moved))
    return moved


def warped(images: Tensor, flows: Tensor) -> Tensor:  # [N, C, H, W], [N, 2, H, W] -> [N, C, H, W]
    """The image at the end of each pixel's flow."""
    height, width = images.shape[-2:]
    one = torch.eye(2, 3, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    still = affine_grid(one, list(images.shape), align_corners=False)  # the sides are -1 and 1
    moved = flows.permute(0, 2, 3, 1) * flows.new_tensor([2 / width, 2 / height])
    return grid_sample(images, still + moved, padding_mode="border", align_corners=False)


def _correction(first: Tensor, second: Tensor) -> Tensor:  # [N, 1, H, W] -> [N, 2, H, W]
    """Least squares of `second - first + gradient . flow = 0` over a window around each pixel."""
    right, down = _slopes((first + second) / 2)
    rise = second - first
    products = torch.cat([right * right, right * down, down * down, right * rise, down * rise], dim=1)
    xx, xy, yy, xt, yt = _windowed(products).unbind(1)
    xx, yy = xx + _RIDGE, yy + _RIDGE
    determinant = xx * yy - xy * xy
    return torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / determinant.unsqueeze(1)


def _slopes(images: Tensor) -> tuple[Tensor, Tensor]:  # [N, 1, H, W] each
    """Central differences to the right and down."""
    kernel = images.new_tensor([-0.5, 0.0, 0.5])
    framed = pad(images, (1, 1, 1, 1), mode="replicate")
    right = conv2d(framed[..., 1:-1, :], kernel.view(1, 1, 1, 3))
    return right, conv2d(framed[..., :, 1:-1], kernel.view(1, 1, 3, 1))


def _windowed(values: Tensor) -> Tensor:
    return avg_pool2d(values, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
