"""Moving digits: scikit-learn's 8 x 8 pictures on a 16 x 16 ground, a pixel further in each frame.

A digit's place is (y, x) of its upper left corner, real numbers in [0, 8]: along the way it goes it moves by `speed`
pixels a frame, across it stands on a fixed lane. Letters: B batch, F = 8 frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlr_ray.rewards.moving_digits import DIRECTIONS, FRAMES

DIGIT, SIZE = 8, 16  # pixels
ROOM = SIZE - DIGIT  # the largest place
MIDDLE = 4.0  # the lane of the model's own videos
LANES = torch.tensor([3.0, 4.0, 5.0])  # places across the way that the classifiers and the VAE see
STARTS = torch.tensor([0.0, 1.0])  # places along the way from which seven steps of one pixel stay inside


def places(
    directions: Tensor,  # [B], indices of DIRECTIONS
    lanes: Tensor,  # [B]
    starts: Tensor,  # [B], from the edge that the digit leaves
    speeds: Tensor | float = 1.0,  # [B], pixels a frame
) -> Tensor:  # [B, F, 2]
    """The digit's place (y, x) in each frame."""
    speeds = torch.as_tensor(speeds, dtype=starts.dtype).expand(len(starts))
    along = starts[:, None] + speeds[:, None] * torch.arange(FRAMES)
    backward = (directions == DIRECTIONS.index("left")) | (directions == DIRECTIONS.index("up"))
    along = torch.where(backward[:, None], ROOM - along, along)
    across = lanes[:, None].expand_as(along)
    vertical = directions >= DIRECTIONS.index("up")
    y = torch.where(vertical[:, None], along, across)
    x = torch.where(vertical[:, None], across, along)
    return torch.stack([y, x], -1)


def draw(digits: Tensor, corners: Tensor) -> Tensor:
    """Digits [B, 8, 8] at places [B, F, 2] as videos [B, F, 3, 16, 16] in [0, 1]; between pixels bilinearly."""
    count, frames = corners.shape[:2]
    pixels = torch.arange(SIZE) - corners[..., None]  # [B, F, 2, 16], in the digit's own pixels
    y, x = ((2 * pixels + 1) / DIGIT - 1).unbind(2)  # grid_sample's coordinates
    grid = torch.stack([x[:, :, None, :].expand(-1, -1, SIZE, -1), y[..., None].expand(-1, -1, -1, SIZE)], -1)
    pictures = digits[:, None].expand(-1, frames, -1, -1).reshape(-1, 1, DIGIT, DIGIT)
    drawn = F.grid_sample(pictures, grid.flatten(0, 1), align_corners=False)
    return drawn.view(count, frames, 1, SIZE, SIZE).expand(-1, -1, 3, -1, -1).clamp(0, 1)


def pick(choices: Tensor, count: int) -> Tensor:
    return choices[torch.randint(len(choices), (count,))]


def random_videos(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Digits [B, 8, 8] moving a pixel a frame in random directions: videos [B, F, 3, 16, 16], directions [B]."""
    count = len(digits)
    directions = torch.randint(len(DIRECTIONS), (count,))
    return draw(digits, places(directions, pick(LANES, count), pick(STARTS, count))), directions


def random_frames(digits: Tensor) -> Tensor:
    """One frame of a random video of each digit [B, 8, 8]: [B, 3, 16, 16]."""
    videos, _ = random_videos(digits)
    return videos[torch.arange(len(digits)), torch.randint(FRAMES, (len(digits),))]
