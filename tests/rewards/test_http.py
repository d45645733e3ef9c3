"""Scores from a server of this test's own."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward

CPU = torch.device("cpu")
IMAGES = torch.linspace(0, 1, 7)[:, None, None, None].expand(7, 3, 4, 5)
PROMPTS = [str(number) for number in range(7)]
METADATA = [{"add": 10 * number} for number in range(7)]


def brightness(asked: dict[str, Any]) -> dict[str, Any]:
    """Mean of the picture, and what the prompt and the metadata say."""
    pixels = [numpy.array(Image.open(io.BytesIO(base64.b64decode(text)))) / 255 for text in asked["images"]]
    numbers = zip(pixels, asked["prompts"], asked["metadata"], strict=True)
    return {"scores": [picture.mean() + int(prompt) + own["add"] for picture, prompt, own in numbers]}


@contextmanager
def server(answer: Callable[[dict[str, Any]], Any], fail_first: int = 0) -> Iterator[tuple[str, list[int]]]:
    """Its URL, and the sizes of the batches that it was asked for; the first requests are answered 503."""
    sizes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sizes.append(len(asked["images"]))
            body = json.dumps(answer(asked)).encode()
            self.send_response(503 if len(sizes) <= fail_first else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/score", sizes
    finally:
        http.shutdown()
        thread.join()


def test_scores_come_in_order_whatever_the_batches() -> None:
    with server(brightness) as (url, sizes):
        reward = load_reward("http", {"url": url, "batch_size": 2, "concurrency": 3}, CPU)
        scores = reward(IMAGES, PROMPTS, METADATA)
    expected = torch.linspace(0, 1, 7) + 11 * torch.arange(7)
    torch.testing.assert_close(scores, expected, atol=1 / 255, rtol=0)
    assert sorted(sizes) == [1, 2, 2, 2]


def test_an_overloaded_server_is_asked_again() -> None:
    with server(brightness, fail_first=2) as (url, sizes):
        scores = load_reward("http", {"url": url, "retries": 2}, CPU)(IMAGES, PROMPTS, METADATA)
    assert len(scores) == 7 and sizes == [7, 7, 7]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"scores": [1.0]}, "gave 1 scores for 7 images"),
        ({"score": [1.0] * 7}, "a JSON object with a list 'scores'"),
        ([1.0] * 7, "a JSON object with a list 'scores'"),
    ],
)
def test_a_wrong_answer_is_shown(answer: Any, words: str) -> None:
    with server(lambda asked: answer) as (url, _), pytest.raises(UserError, match=words):
        load_reward("http", {"url": url}, CPU)(IMAGES, PROMPTS, METADATA)


def test_a_server_that_stays_away_is_named() -> None:
    with server(brightness) as (url, _):
        pass  # and is gone
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/score gave no scores"):
        load_reward("http", {"url": url, "retries": 1}, CPU)(IMAGES, PROMPTS, METADATA)
