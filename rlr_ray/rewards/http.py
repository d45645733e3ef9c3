"""Scores from a server: a vision-language judge, a detector, whatever answers over HTTP. A black box."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch
from torch import Tensor

from rlr_ray.asking import Server
from rlr_ray.errors import UserError
from rlr_ray.rewards.pixels import kind_of, pictures


class Reward:
    """Posts JSON {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]} and expects {"scores": [...]}.

    With the reward's `video: true` {"videos": [[PNG of each frame, ...], ...], ...} in place of images.

    `batch_size` images, or frames of whole videos, a request, `concurrency` requests at once. A server that cannot be
    reached, is overloaded (429, 502, 503, 504) or does not answer within `timeout_s` is asked again for `patience_s`
    after a first failure.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        timeout_s: float = 60.0,
        patience_s: float = 60.0,
        concurrency: int = 4,
        batch_size: int = 8,
        headers: dict[str, str] | None = None,
    ):
        self.url, self.concurrency, self.batch_size = url, concurrency, batch_size
        self.server = Server("reward 'http'", url, timeout_s, patience_s, concurrency, headers or {})

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        size = self.batch_size if images.dim() == 4 else max(1, self.batch_size // images.shape[1])
        starts = range(0, len(images), size)
        batches = [[given[start : start + size] for start in starts] for given in (images, prompts, metadata)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            scores = pool.map(self._scores, *batches)
            return torch.tensor([score for batch in scores for score in batch])

    def _scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        seen = {"videos": [_encoded(video) for video in images]} if images.dim() == 5 else {"images": _encoded(images)}
        asked: Any = seen | {"prompts": list(prompts), "metadata": list(metadata)}
        try:
            answer = self.server.answer(asked)
        except requests.RequestException as error:
            raise UserError(
                f"reward 'http': {self.url} gave no scores ({error}); see whether the server runs and what it logs; or "
                f"raise reward.options.patience_s ({self.server.patience_s:g} s, for one that is away) or timeout_s "
                f"({self.server.timeout_s:g} s, for one that is slow)"
            ) from error
        try:
            scores = [math.nan if score is None else float(score) for score in answer.json()["scores"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"reward 'http': {self.url} answered {answer.text[:200]!r}; allowed: a JSON object with a list "
                "'scores' of numbers"
            ) from error
        if len(scores) != len(images):
            raise UserError(
                f"reward 'http': {self.url} gave {len(scores)} scores for {len(images)} {kind_of(images)}s; allowed: "
                "one each, in their order"
            )
        return scores


def _encoded(images: Tensor) -> list[str]:
    texts = []
    for picture in pictures(images):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts
