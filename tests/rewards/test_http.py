"""Scores from a server of this test's own."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score
from tests.rewards.servers import ServerApart, brightness, server

CPU = torch.device("cpu")
IMAGES = torch.linspace(0, 1, 7)[:, None, None, None].expand(7, 3, 4, 5)
PROMPTS = [str(number) for number in range(7)]
METADATA = [{"add": 10 * number} for number in range(7)]


def reward(url: str, **options: Any) -> Any:
    return load_reward("http", {"url": url} | options, CPU)


def test_scores_come_in_order_whatever_the_batches(caplog: pytest.LogCaptureFixture) -> None:
    with server(brightness) as (url, sizes):
        scores = reward(url, batch_size=2, concurrency=3)(IMAGES, PROMPTS, METADATA)
    expected = torch.linspace(0, 1, 7) + 11 * torch.arange(7)
    torch.testing.assert_close(scores, expected, atol=1 / 255, rtol=0)
    assert sorted(sizes) == [1, 2, 2, 2]
    assert not caplog.messages


def test_an_overloaded_server_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    with server(brightness, fail_first=2) as (url, sizes):
        scores = reward(url)(IMAGES, PROMPTS, METADATA)
    assert len(scores) == 7 and sizes == [7, 7, 7]
    away, back = caplog.messages  # once each, however often it was asked
    assert "503" in away and "asking again for 60 s" in away
    assert "answers again, after" in back


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"scores": [1.0]}, "gave 1 scores for 7 images"),
        ({"score": [1.0] * 7}, "a JSON object with a list 'scores' of numbers"),
        ([1.0] * 7, "a JSON object with a list 'scores' of numbers"),
        ({"scores": ["good"] * 7}, "a JSON object with a list 'scores' of numbers"),
    ],
)
def test_a_wrong_answer_is_shown(answer: Any, words: str) -> None:
    with server(lambda asked: answer) as (url, _), pytest.raises(UserError, match=words):
        reward(url)(IMAGES, PROMPTS, METADATA)


@pytest.mark.parametrize("bad", [float("nan"), None])
def test_an_image_without_a_number_is_named_and_not_averaged_away(bad: float | None) -> None:
    scores = [0.5] * 4 + [bad] + [0.5] * 2
    assert json.dumps(bad) in ("NaN", "null")
    with (
        server(lambda asked: {"scores": scores}) as (url, _),
        pytest.raises(UserError, match=r"returned nan for image 4 \(prompt '4'\)"),
    ):
        score(reward(url), IMAGES, PROMPTS, METADATA, "http")


def test_a_server_killed_amid_a_request_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    first, others = ServerApart(delay_s=60), []

    def kill_and_restart() -> None:
        first.kill(once_asked=True)
        time.sleep(0.5)
        others.append(ServerApart(first.port))

    thread = threading.Thread(target=kill_and_restart)
    thread.start()
    try:
        scores = reward(first.url, patience_s=20, batch_size=3)(IMAGES, PROMPTS, METADATA)
    finally:
        thread.join()
        others[0].kill()
    assert scores.tolist() == list(range(7))
    assert sum("asking again for 20 s" in message for message in caplog.messages) == 1  # for three batches
    assert sum("answers again" in message for message in caplog.messages) == 1


def test_a_server_that_stays_away_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with server(brightness) as (url, _):
        pass  # and is gone
    started = time.monotonic()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/score gave no scores .* raise reward\.options\.patience_s"):
        reward(url, patience_s=0.6, batch_size=1, concurrency=2)(IMAGES, PROMPTS, METADATA)
    assert 0.6 < time.monotonic() - started < 1.5  # not once more for every batch
    assert len(caplog.messages) == 1


def test_a_slow_server_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """One request takes ten times as long as the others, but not as long as `timeout_s`."""
    with server(brightness, slow_first_s=0.5) as (url, _):
        scores = reward(url, batch_size=2, timeout_s=5)(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(scores, torch.linspace(0, 1, 7) + 11 * torch.arange(7), atol=1 / 255, rtol=0)
    assert not caplog.messages


def test_a_request_that_takes_too_long_is_made_again() -> None:
    with server(brightness, slow_first_s=1.0) as (url, sizes):
        scores = reward(url, timeout_s=0.3)(IMAGES, PROMPTS, METADATA)
    assert len(scores) == 7 and sizes == [7, 7]


def test_a_server_that_is_always_too_slow_is_named() -> None:
    waiting = threading.Event()
    with (
        server(lambda asked: waiting.wait(5)) as (url, sizes),
        pytest.raises(UserError, match=r"timed out.*timeout_s \(0\.2 s, for one that is slow\)"),
    ):
        try:
            reward(url, timeout_s=0.2, patience_s=0.3)(IMAGES, PROMPTS, METADATA)
        finally:
            waiting.set()
    assert len(sizes) >= 2


def test_an_error_of_the_servers_own_is_not_asked_again() -> None:
    with server(brightness) as (url, sizes), pytest.raises(UserError, match="501"):
        built = reward(url)
        session = built.server.session
        session.post = session.put  # which the server does not know
        built(IMAGES, PROMPTS, METADATA)
    assert not sizes
