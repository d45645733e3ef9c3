"""Optical flow between frames in torch, so that gradients pass: Lucas and Kanade 1981, from coarse to fine.

B videos, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, grid_sample, interpolate, pad

from rlr_ray.errors import UserError

_SIDE = 64  # pixels that a frame's shorter side is reduced to
_COARSEST = 8  # pixels of the shorter side on the coarsest level
_WINDOW = 5  # pixels a side, over which the flow is taken as one
_TWICE = 2  # times the flow of a level is corrected
_RIDGE = 1e-3  # added to the squared gradients: where there is no texture the flow is 0


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
    """How far each pixel of `first` has moved in `second`, in pixels to the right and down."""
    levels = [(first.unsqueeze(1), second.unsqueeze(1))]
    while min(levels[-1][0].shape[-2:]) >= 2 * _COARSEST:
        one, other = levels[-1]
        levels.append((avg_pool2d(one, 2), avg_pool2d(other, 2)))
    found = first.new_zeros(len(first), 2, *levels[-1][0].shape[-2:])
    for one, other in reversed(levels):
        size = one.shape[-2:]
        if found.shape[-2:] != size:
            found = 2 * interpolate(found, size, mode="bilinear")
        for _ in range(_TWICE):
            found = found + _correction(one, warped(other, found))
    return found


def warped(images: Tensor, flows: Tensor) -> Tensor:  # [N, C, H, W], [N, 2, H, W] -> [N, C, H, W]
    """What lies at the end of each pixel's flow."""
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
