"""Scores from a server: a vision-language judge, a detector, whatever answers over HTTP. A black box."""

from __future__ import annotations

import base64
import io
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.images import kind_of, pictures
from rlr_ray.utils.environment import concealed


class Http:
    """Posts JSON {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]} and expects {"scores": [...]}.

    With the reward's `video: true` {"videos": [[PNG of each frame, ...], ...], ...} in place of images.

    `batch_size` images, or frames of whole videos, a request, `concurrency` requests at once; `timeout_s` and
    `patience_s` as of a Server.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 60.0,
        patience_s: float = 60.0,
        concurrency: int = 4,
        batch_size: int = 8,
        headers: dict[str, str] | None = None,
    ):
        self.shown, self.concurrency, self.batch_size = concealed(url), concurrency, batch_size
        self.server = Server("reward 'http'", url, timeout_s, patience_s, concurrency, headers or {})

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        size = self.batch_size if images.dim() == 4 else max(1, self.batch_size // images.shape[1])
        starts = range(0, len(images), size)
        batches = [[values[start : start + size] for start in starts] for values in (images, prompts, metadata)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            scores = pool.map(self._scores, *batches)
            return torch.tensor([score for batch in scores for score in batch])

    def _scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        seen = {"videos": [encoded(video) for video in images]} if images.dim() == 5 else {"images": encoded(images)}
        asked: Any = seen | {"prompts": list(prompts), "metadata": list(metadata)}
        try:
            answer = self.server.answer(asked)
        except requests.RequestException as error:
            raise UserError(
                f"reward 'http': {self.shown} gave no scores ({concealed(error)}); see whether the server runs and "
                f"what it logs; or raise reward.options.patience_s ({self.server.patience_s:g} s, for one that is "
                f"away) or timeout_s ({self.server.timeout_s:g} s, for one that is slow)"
            ) from None  # the error quotes the URL, and Ray writes whole tracebacks to its logs
        try:
            scores = [math.nan if score is None else float(score) for score in answer.json()["scores"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"reward 'http': {self.shown} answered {concealed(answer.text)[:200]!r}; allowed: a JSON object with "
                "a list 'scores' of numbers"
            ) from error
        if len(scores) != len(images):
            raise UserError(
                f"reward 'http': {self.shown} gave {len(scores)} scores for {len(images)} {kind_of(images)}s; allowed: "
                "one each, in their order"
            )
        return scores


def encoded(images: Tensor) -> list[str]:
    """images [B, 3, H, W] in [0, 1] as PNG in base64."""
    texts = []
    for picture in pictures(images):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def said_in(answer: requests.Response) -> str:
    """What a model says in an answer of OpenAI's chat completions. Raises UserError for any other answer."""
    try:
        return str(answer.json()["choices"][0]["message"]["content"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{concealed(answer.url)} answered {concealed(answer.text)[:200]!r}; allowed: what OpenAI's "
            "/chat/completions answers; give the address of a server that speaks it, up to /v1"
        ) from error


_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0  # between two tries; each is twice the one before
_BUSY = (429, 502, 503, 504)
_AWAY = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Server:
    """A server that takes JSON at `url`; `name` is what messages call it. May be asked from several threads.

    If it cannot be reached, is overloaded (429, 502, 503, 504) or does not answer within `timeout_s`, it is asked again
    for `patience_s` after a first failure.
    """

    def __init__(
        self, name: str, url: str, timeout_s: float, patience_s: float, at_once: int, headers: Mapping[str, str]
    ):
        self.url, self.timeout_s, self.patience_s = url, timeout_s, patience_s
        self.outage = _Outage(f"{name}: {concealed(url)}", patience_s)
        self.session = requests.Session()
        self.session.headers.update(headers)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=at_once))

    def answer(self, asked: Any) -> requests.Response:
        """Raises requests.RequestException if there is none within the patience."""
        failed_at, pause_s = math.inf, _FIRST_PAUSE_S
        while True:
            try:
                answer = self.session.post(self.url, json=asked, timeout=self.timeout_s)
                answer.raise_for_status()
                self.outage.ends()
                return answer
            except requests.RequestException as error:
                busy = error.response is not None and error.response.status_code in _BUSY
                if not (busy or isinstance(error, _AWAY)):
                    raise
                failed_at = min(failed_at, time.monotonic())
                left_s = self.outage.left_s(failed_at, error)
                if left_s <= 0:
                    raise
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _Outage:
    """A time during which a server gives nothing, shared by all requests: said once, and once that it is over."""

    def __init__(self, server: str, patience_s: float):
        self.server, self.patience_s = server, patience_s
        self.since: float | None = None
        self.lock = Lock()

    def left_s(self, failed_at: float, error: Exception) -> float:
        """Seconds left to try again a request that first failed at `failed_at`, now failed with `error`."""
        with self.lock:
            if self.since is None:
                self.since = failed_at
                logging.getLogger(__name__).warning(
                    "%s gave no answer (%s); asking again for %g s", self.server, concealed(error), self.patience_s
                )
            return min(self.since, failed_at) + self.patience_s - time.monotonic()

    def ends(self) -> None:
        with self.lock:
            if self.since is not None:
                away_s = time.monotonic() - self.since
                logging.getLogger(__name__).warning("%s answers again, after %.1f s", self.server, away_s)
                self.since = None
