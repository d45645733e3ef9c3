"""A vision-language model as a judge, behind any server that speaks OpenAI's chat completions. A black box."""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import requests
import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.http import Server, encoded, said_in
from rlr_ray.utils.environment import concealed

_KEPT = 100_000  # answers
_QUESTION = (
    "How well does the picture show this, and how good is it as a picture? {prompt}\n"
    "Answer with a number from {low} (not at all) to {high} (perfectly)."
)


class Vlm:
    """The number that the model answers, between `low` and `high`.

    `url` is the server's up to /v1. `question` may hold {prompt}, {low}, {high} and any column of the metadata. The
    answer must be JSON of the schema that goes with the question; of one that is not, the model is asked `tries` times,
    and then the image has no score (see the reward's `invalid`). The same question of the same picture is asked once.
    Of a video all frames are shown. The rest as `http` has it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str = _QUESTION,
        low: float = 0.0,
        high: float = 10.0,
        tries: int = 3,
        temperature: float = 0.0,
        timeout_s: float = 120.0,
        patience_s: float = 60.0,
        concurrency: int = 8,
        headers: dict[str, str] | None = None,
    ):
        if not low < high:
            raise UserError(f"reward 'vlm' has low {low:g} and high {high:g}; allowed: low below high")
        self.model, self.question, self.range, self.tries = model, question, (low, high), tries
        self.temperature, self.concurrency = temperature, concurrency
        url = f"{url.rstrip('/')}/chat/completions"
        self.server = Server("reward 'vlm'", url, timeout_s, patience_s, concurrency, headers or {})
        self.known: OrderedDict[str, float] = OrderedDict()  # by digests of what was asked, the oldest first
        self.lock = Lock()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        asked = [self._asked(*one) for one in zip(images, prompts, metadata, strict=True)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            return torch.tensor(list(pool.map(self._score, asked)))

    def _asked(self, image: Tensor, prompt: str, metadata: dict[str, Any]) -> dict[str, Any]:  # [3, H, W], [F, 3, H, W]
        low, high = self.range
        try:
            text = self.question.format(**metadata | {"prompt": prompt, "low": f"{low:g}", "high": f"{high:g}"})
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"reward 'vlm': question {self.question!r} cannot be filled in for prompt {prompt!r} ({error!r}); "
                f"allowed in braces: prompt, low, high{''.join(f', {name}' for name in metadata)}; double other braces"
            ) from error
        shown = [f"data:image/png;base64,{code}" for code in encoded(image if image.dim() == 4 else image[None])]
        content = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in shown)]
        number = {"type": "number", "minimum": low, "maximum": high}
        schema = {
            "type": "object",
            "properties": {"score": number},
            "required": ["score"],
            "additionalProperties": False,
        }
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "score", "strict": True, "schema": schema},
            },
        }

    def _score(self, asked: dict[str, Any]) -> float:
        """nan if no answer is a score."""
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        with self.lock:
            if key in self.known:
                return self.known[key]
        score = next(
            (score for _ in range(self.tries) if not math.isnan(score := self._read(self._say(asked)))), math.nan
        )
        with self.lock:
            if not math.isnan(score):
                self.known[key] = score
            if len(self.known) > _KEPT:
                self.known.popitem(last=False)
        return score

    def _say(self, asked: dict[str, Any]) -> str:
        try:
            answer = self.server.answer(asked)
        except requests.RequestException as error:
            raise UserError(
                f"reward 'vlm': {concealed(self.server.url)} gave no answer ({concealed(error)}); see whether the "
                "server runs, has the model, takes pictures and JSON schemas, and whether headers have its key"
            ) from None  # the error quotes the URL
        return said_in(answer)

    def _read(self, said: str) -> float:
        """The score in an answer, whatever stands around its object; nan if there is none within the range."""
        try:
            score = float(json.loads(said[said.find("{") : said.rfind("}") + 1])["score"])
        except (KeyError, TypeError, ValueError):
            return math.nan
        return score if self.range[0] <= score <= self.range[1] else math.nan
