"""Scores from a server: a vision-language judge, a detector, whatever answers over HTTP. A black box."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util import Retry

from rlr_ray.errors import UserError
from rlr_ray.rewards.pixels import pictures


class Reward:
    """Posts JSON {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]} and expects {"scores": [...]}.

    `batch_size` images a request, `concurrency` requests at once, tried again `retries` times, a little later each
    time, if the server cannot be reached, is overloaded (429, 502, 503, 504) or does not answer within `timeout_s`.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        timeout_s: float = 60.0,
        retries: int = 5,
        concurrency: int = 4,
        batch_size: int = 8,
        headers: dict[str, str] | None = None,
    ):
        self.url, self.timeout_s, self.concurrency, self.batch_size = url, timeout_s, concurrency, batch_size
        again = Retry(retries, backoff_factor=0.5, status_forcelist=[429, 502, 503, 504], allowed_methods=None)
        self.session = requests.Session()
        self.session.headers.update(headers or {})
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=concurrency))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        size, starts = self.batch_size, range(0, len(images), self.batch_size)
        batches = [[given[start : start + size] for start in starts] for given in (images, prompts, metadata)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            scores = pool.map(self._scores, *batches)
            return torch.tensor([score for batch in scores for score in batch])

    def _scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        asked: Any = {"images": _encoded(images), "prompts": list(prompts), "metadata": list(metadata)}
        try:
            answer = self.session.post(self.url, json=asked, timeout=self.timeout_s)
            answer.raise_for_status()
            scores = answer.json()["scores"]
        except requests.RequestException as error:
            raise UserError(
                f"reward 'http': {self.url} gave no scores ({error}); see whether the server runs and what it logs, or "
                "raise reward.options.timeout_s or retries"
            ) from error
        except (KeyError, TypeError) as error:
            raise UserError(
                f"reward 'http': {self.url} answered {answer.text[:200]!r}; allowed: a JSON object with a list 'scores'"
            ) from error
        if len(scores) != len(images):
            raise UserError(
                f"reward 'http': {self.url} gave {len(scores)} scores for {len(images)} images; allowed: one an image, "
                "in their order"
            )
        return [float(score) for score in scores]


def _encoded(images: Tensor) -> list[str]:
    texts = []
    for picture in pictures(images):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts
