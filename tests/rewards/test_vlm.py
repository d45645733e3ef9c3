"""A vision-language judge behind a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score
from tests.rewards.servers import listening

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255


@contextmanager
def judge(said: Callable[[dict[str, Any], int], str], busy: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its URL up to /v1 and what it was asked; the first `busy` requests are answered 429."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
            content = said(asked[-1], len(asked))
            body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(429 if len(asked) <= busy else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with listening(Handler) as url:
        yield f"{url}/v1/", asked


def brightness(asked: dict[str, Any], count: int) -> str:
    """Ten times the mean of the picture, in JSON with words around it."""
    code = asked["messages"][0]["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,")
    mean = np.array(Image.open(io.BytesIO(base64.b64decode(code)))).mean() / 255
    return f'I would say:\n```json\n{{"score": {10 * mean}}}\n```'


def test_it_answers_what_the_model_says_of_each_picture_and_is_asked_once() -> None:
    with judge(brightness, busy=2) as (url, asked):
        reward = load_reward(
            "vlm", {"url": url, "model": "m", "question": "{prompt} in {style}?", "concurrency": 2}, CPU
        )
        metadata = [{"style": f"oil {n}"} for n in range(4)]
        for _ in range(2):
            scores = score(reward, IMAGES, ["a", "b", "c", "d"], metadata, "vlm")
            torch.testing.assert_close(scores, 10 * IMAGES.mean((1, 2, 3)), atol=1e-5, rtol=0)
        assert len(asked) == 4 + 2 and {one["path"] for one in asked} == {"/v1/chat/completions"}
        assert {one["messages"][0]["content"][0]["text"] for one in asked} == {
            f"{p} in oil {n}?" for n, p in enumerate("abcd")
        }
        schema = asked[0]["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["score"] == {"type": "number", "minimum": 0, "maximum": 10}
        score(reward, IMAGES[:1], ["another"], metadata[:1], "vlm")
        assert len(asked) == 7


@pytest.mark.parametrize("nonsense", ["seven", '{"score": 11}', '{"score": "high"}', "[3]", '{"points": 3}'])
def test_an_answer_that_is_no_score_is_asked_for_again_and_then_has_none(nonsense: str) -> None:
    def late(asked: dict[str, Any], count: int) -> str:
        return '{"score": 3}' if count > 2 else nonsense

    options = {"model": "m", "concurrency": 1}
    with judge(late) as (url, _):
        assert load_reward("vlm", options | {"url": url}, CPU)(IMAGES[:1], ["a"], [{}]).tolist() == [3.0]
    with judge(lambda *_: nonsense) as (url, asked):
        found = load_reward("vlm", options | {"url": url, "tries": 2}, CPU)(IMAGES[:1], ["a"], [{}])
        assert found.isnan().all() and len(asked) == 2


def test_what_is_no_such_server_or_question_is_refused() -> None:
    strange = load_reward("vlm", {"url": "http://a", "model": "m", "question": "{what}"}, CPU)
    with pytest.raises(UserError, match=r"filled in for prompt 'a' .*allowed in braces: prompt, low, high, n"):
        strange(IMAGES[:1], ["a"], [{"n": 1}])
    with pytest.raises(UserError, match=r"gave no answer .*see whether the server runs"):
        options = {"url": "http://127.0.0.1:1", "model": "m", "patience_s": 0.01}
        load_reward("vlm", options, CPU)(IMAGES[:1], ["a"], [{}])
    with pytest.raises(UserError, match="low 1 and high 0"):
        load_reward("vlm", {"url": "http://a", "model": "m", "low": 1, "high": 0}, CPU)
