"""Servers that are asked over HTTP, with patience for one that is away."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any

import requests
from requests.adapters import HTTPAdapter

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0  # between two tries; each is twice the one before
_BUSY = (429, 502, 503, 504)
_AWAY = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Server:
    """One that takes JSON at `url`; `name` is what messages call it. May be asked from several threads.

    If it cannot be reached, is overloaded (429, 502, 503, 504) or does not answer within `timeout_s`, it is asked again
    for `patience_s` after a first failure.
    """

    def __init__(
        self, name: str, url: str, timeout_s: float, patience_s: float, at_once: int, headers: Mapping[str, str]
    ):
        self.url, self.timeout_s, self.patience_s = url, timeout_s, patience_s
        self.outage = _Outage(f"{name}: {url}", patience_s)
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
                    "%s gave no answer (%s); asking again for %g s", self.server, error, self.patience_s
                )
            return min(self.since, failed_at) + self.patience_s - time.monotonic()

    def ends(self) -> None:
        with self.lock:
            if self.since is not None:
                away_s = time.monotonic() - self.since
                logging.getLogger(__name__).warning("%s answers again, after %.1f s", self.server, away_s)
                self.since = None
