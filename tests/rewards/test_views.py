"""What rewards see of videos, against videos whose frames say which they are."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.config.recipe import with_facts
from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.errors import UserError
from rlr_ray.rewards.mixture import Mixture, evenly

CPU = torch.device("cpu")
FRAMES = 8
# Video b's frame f is everywhere 10 b + f.
VIDEOS = (10.0 * torch.arange(2).view(2, 1) + torch.arange(FRAMES))[..., None, None, None].expand(2, FRAMES, 3, 4, 4)
ASKED: tuple[list[str], list[dict[str, Any]]] = (["two", "three"], [{"n": 2}, {"n": 3}])


def bright(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    assert images.dim() == 4 and len(prompts) == len(metadata) == len(images)
    assert all(prompt == {2: "two", 3: "three"}[data["n"]] for prompt, data in zip(prompts, metadata, strict=True))
    return images.mean((1, 2, 3)) ** 2


def last(videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return videos[:, -1].mean((1, 2, 3))


def odd(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Not a number for the picture of brightness 13."""
    return torch.where(images.mean((1, 2, 3)) == 13, torch.nan, images.mean((1, 2, 3)))


bright.differentiable = last.differentiable = odd.differentiable = last.video = True  # type: ignore[attr-defined]
own = ModuleType("video_rewards_for_tests")
own.bright, own.last, own.odd = bright, last, odd  # type: ignore[attr-defined]
sys.modules[own.__name__] = own


def mixture(frames: int | None = FRAMES, **rewards: dict[str, Any]) -> Mixture:
    configs = {
        name: with_facts(JudgeConfig(name=f"video_rewards_for_tests:{name}", **keys)) for name, keys in rewards.items()
    }
    return Mixture(configs, CPU, {}, frames)


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert evenly(8, 8, "") == tuple(range(8))
    assert evenly(8, 1, "") == (4,) and evenly(8, 2, "") == (2, 6) and evenly(16, 4, "") == (2, 6, 10, 14)
    with pytest.raises(UserError, match=r"'bright' has frames: 9; allowed: 1 to 8"):
        mixture(bright={"frames": 9})


@pytest.mark.parametrize("whole", [True, False])
def test_each_reward_sees_its_frames_of_whole_videos_or_of_those_that_were_decoded(whole: bool) -> None:
    rewards = mixture(bright={"frames": 2}, last={"frames": 4})
    assert rewards.frames == [1, 2, 3, 5, 6, 7]
    found = rewards.score(VIDEOS if whole else VIDEOS[:, rewards.frames], *ASKED).scores
    torch.testing.assert_close(found[0], torch.tensor([(2**2 + 6**2) / 2, (12**2 + 16**2) / 2]))
    torch.testing.assert_close(found[1], torch.tensor([7.0, 17.0]))


def test_gradients_reach_the_seen_frames_alone() -> None:
    videos = VIDEOS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture(bright={"frames": 2}).score(videos, *ASKED).scores.sum(), videos)
    assert gradient.flatten(2).abs().sum(2).bool().tolist() == [[frame in (2, 6) for frame in range(FRAMES)]] * 2
    torch.testing.assert_close(gradient[0, 6, 0, 0, 0], torch.tensor(2 * 6 / 2 / 48))


def test_a_video_with_one_bad_frame_is_replaced_whole_and_has_no_gradient() -> None:
    rewards = mixture(odd={"invalid": -1})
    videos = VIDEOS.clone().requires_grad_()
    scored = rewards.score(videos, *ASKED)
    assert scored.scores.tolist() == [[3.5, -1.0]] and scored.invalid == 1
    (gradient,) = torch.autograd.grad(scored.scores.sum(), videos)
    assert gradient[0].all() and not gradient[1].any()


def test_what_a_config_states_goes_before_what_a_reward_says() -> None:
    assert mixture(last={"video": False}).views["last"].together is False
    with pytest.raises(UserError, match="raised AssertionError"):
        mixture(bright={"video": True}).score(VIDEOS, *ASKED)


@pytest.mark.parametrize(
    ("name", "keys", "words"), [("last", {}, "sees videos"), ("bright", {"frames": 2}, "`frames`")]
)
def test_rewards_of_videos_are_refused_where_the_model_draws_images(
    name: str, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"{words}.*draws images"):
        mixture(None, **{name: keys})
