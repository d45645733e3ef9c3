"""The classifiers of moving digits against videos that neither saw; the rewards against their definition."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.errors import UserError
from rlr_ray.rewards.digits import WORDS, load_classifier
from rlr_ray.rewards.moving_digits import DIRECTIONS, STILL, MovingDigits, MovingDigitsJudge, VideoClassifier
from scripts.build_moving_digits import accuracy, held_out
from scripts.moving import draw, places

LEFT, RIGHT, UP, DOWN = range(4)
OPPOSITE = torch.tensor([RIGHT, LEFT, DOWN, UP])
CLASSIFIERS = ["reward", "judge"]


def captions(digits: Tensor, directions: Tensor) -> list[str]:
    return [
        f"a {WORDS[digit]} moving {DIRECTIONS[direction]}"
        for digit, direction in zip(digits.tolist(), directions.tolist(), strict=True)
    ]


def test_a_drawn_digit_moves_a_pixel_a_frame_and_stays_whole() -> None:
    digit = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    corners = places(torch.arange(4), torch.full((4,), 3.0), torch.ones(4))  # [4, F, 2]
    videos = draw(digit, corners)
    for direction, (y, x) in {LEFT: (3, 7), RIGHT: (3, 1), UP: (7, 3), DOWN: (1, 3)}.items():
        step_y, step_x = {LEFT: (0, -1), RIGHT: (0, 1), UP: (-1, 0), DOWN: (1, 0)}[direction]
        for frame in range(8):
            expected = torch.zeros(3, 16, 16)
            top, left = y + step_y * frame, x + step_x * frame
            expected[:, top : top + 8, left : left + 8] = digit[direction]
            torch.testing.assert_close(videos[direction, frame], expected, atol=1e-5, rtol=0)


def test_the_files_are_small() -> None:
    assert sum(file.stat().st_size for file in MOVING_DIGITS.rglob("*") if file.is_file()) < 3e6


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifiers_read_videos_that_they_have_not_seen(name: str) -> None:
    assert accuracy(load_classifier(VideoClassifier, MOVING_DIGITS / f"{name}.safetensors"), *held_out()) > 0.9


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_reversed_time_goes_the_other_way(name: str) -> None:
    videos, digits, directions = held_out()
    backward = (videos.flip(1), digits, OPPOSITE[directions])
    assert accuracy(load_classifier(VideoClassifier, MOVING_DIGITS / f"{name}.safetensors"), *backward) > 0.9


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_digit_that_stays_is_no_way_to_a_good_score(name: str) -> None:
    """It must be worse than a guess: else a reward's first gain is to stop all motion."""
    videos, _, directions = held_out()
    stopped = videos[:, :1].expand_as(videos)
    _, motions = load_classifier(VideoClassifier, MOVING_DIGITS / f"{name}.safetensors")(stopped)
    scores = motions.log_softmax(1)[torch.arange(len(videos)), directions]
    assert scores.mean() < -3 and (motions.argmax(1) == STILL).double().mean() > 0.9


def test_the_reward_adds_the_two_log_probabilities() -> None:
    videos, digits, directions = (part[:8] for part in held_out())
    reward = MovingDigits()
    found = reward(videos, captions(digits, directions), [{}] * 8)
    of_digit, of_direction = (logits.softmax(1) for logits in reward.classifier(videos))
    expected = [of_digit[i, digits[i]] * of_direction[i, directions[i]] for i in range(8)]
    torch.testing.assert_close(found, torch.stack(expected).log())


def test_the_judge_wants_both_right() -> None:
    videos, digits, directions = held_out()
    judge = MovingDigitsJudge()
    metadata: list[dict[str, object]] = [{}] * len(videos)
    right = judge(videos, captions(digits, directions), metadata)
    assert set(right.tolist()) == {0.0, 1.0}
    assert right.mean().item() == pytest.approx(accuracy(judge.classifier, videos, digits, directions))
    other_digit = judge(videos, captions((digits + 1) % 10, directions), metadata)
    other_direction = judge(videos, captions(digits, OPPOSITE[directions]), metadata)
    assert not (right * other_digit).any() and not (right * other_direction).any()


@pytest.mark.parametrize("reward", [MovingDigits, MovingDigitsJudge])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat moving left", "one digit, found 'a cat moving left'"),
        ("a three or a four moving left", "one digit, found"),
        ("a three", "one direction, found 'a three'; allowed words: left, right, up, down"),
        ("a three moving left and right", "one direction, found"),
    ],
)
def test_a_prompt_must_name_one_digit_and_one_direction(reward: type, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        reward()(torch.zeros(1, 8, 3, 16, 16), [prompt], [{}])


@pytest.mark.parametrize("reward", [MovingDigits, MovingDigitsJudge])
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 16, 3, 16, 16), (1, 8, 3, 32, 32)])
def test_a_video_must_have_the_classifiers_shape(reward: type, shape: tuple[int, ...]) -> None:
    expected = f"shaped [B, 8, 3, 16, 16], found {list(shape)}"
    with pytest.raises(UserError, match=re.escape(expected)):
        reward()(torch.zeros(shape), ["a three moving left"], [{}])
