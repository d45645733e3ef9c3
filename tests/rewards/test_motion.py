"""Motion in videos, against textures that move as they were told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from rlr_ray.rewards.motion import flow, grey_frames, warped

CPU = torch.device("cpu")
HEIGHT, WIDTH = 48, 64


def moving(right: float, down: float, *, jitter: float = 0.0, frames: int = 6) -> Tensor:  # [1, F, 3, H, W]
    """A texture of twelve waves that moves by so many pixels a frame, each frame shifted at random besides."""
    source = torch.Generator().manual_seed(1)
    waves, phases = 0.35 * torch.randn(12, 2, generator=source), 6.28 * torch.rand(12, generator=source)
    shifts = jitter * torch.randn(frames, 2, generator=source)
    y, x = torch.meshgrid(torch.arange(HEIGHT).double(), torch.arange(WIDTH).double(), indexing="ij")
    pictures = []
    for frame, shift in enumerate(shifts):
        at_x, at_y = x - right * frame - shift[0], y - down * frame - shift[1]
        bright = sum(
            torch.cos(wave[0] * at_x + wave[1] * at_y + phase) for wave, phase in zip(waves, phases, strict=True)
        )
        pictures.append(0.5 + torch.as_tensor(bright) / 24)
    return torch.stack(pictures)[None, :, None].expand(1, frames, 3, HEIGHT, WIDTH)


def scores(name: str, *videos: Tensor) -> Tensor:
    return load_reward(name, {}, CPU)(torch.cat(videos), [""] * len(videos), [{}] * len(videos))


@pytest.mark.parametrize(("right", "down"), [(0, 0), (0.5, 0), (1, -0.5), (2, 0), (3, 1), (5, 0)])
def test_the_flow_is_how_far_the_texture_moved(right: float, down: float) -> None:
    frames = grey_frames(moving(right, down), 2, "")[0]
    inner = flow(frames[:1], frames[1:2])[0, :, 8:-8, 8:-8]  # at the border what moves in was never seen
    assert inner.mean((1, 2)).tolist() == pytest.approx([right, down], abs=0.05)
    assert inner.std((1, 2)).max() < 0.2


def test_warping_by_whole_pixels_is_a_shift() -> None:
    picture = moving(0, 0)[:, 0]
    flows = torch.tensor([2.0, -3.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, HEIGHT, WIDTH)
    torch.testing.assert_close(warped(picture, flows)[..., 3:, :-2], picture[..., :-3, 2:])


def test_large_frames_are_reduced_before_motion_is_looked_for() -> None:
    large = moving(0.5, 0).repeat_interleave(4, -2).repeat_interleave(4, -1)  # 192 x 256
    assert grey_frames(large, 2, "").shape[-2:] == (64, 85)
    torch.testing.assert_close(
        scores("dynamic_degree", large), scores("dynamic_degree", moving(0.5, 0)), rtol=0.15, atol=0
    )


def test_the_dynamic_degree_is_the_speed_in_percent_of_the_shorter_side() -> None:
    found = scores("dynamic_degree", *(moving(speed, 0) for speed in (0, 1, 2)))
    assert found[0] < 0.01
    assert found[1:].tolist() == pytest.approx(
        [100 / HEIGHT, 200 / HEIGHT], rel=0.5
    )  # the fastest 5 % are a bit faster
    assert found[2] > 1.5 * found[1]


def test_even_motion_is_smoother_than_jitter_at_the_same_speed() -> None:
    still, even, jittered = scores("motion_smoothness", moving(0, 0), moving(2, 0), moving(2, 0, jitter=1.0))
    assert still == 1 and 1 - even < 0.01 and 1 - jittered > 5 * (1 - even)


def test_too_few_frames_are_told() -> None:
    with pytest.raises(UserError, match=r"motion_smoothness.* 2 frames.*3 or more"):
        scores("motion_smoothness", moving(1, 0, frames=2))
