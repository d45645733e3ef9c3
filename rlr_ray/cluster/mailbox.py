"""What the driver and the leading worker tell each other. Imports nothing heavy: it is a process of its own."""

from __future__ import annotations

import time
from typing import Any


class Mailbox:
    """Carries updates' rows, words and errors to the driver, and the crew of rollout actors to the leading worker."""

    def __init__(self) -> None:
        self.news: list[dict[str, Any] | str] = []
        self.error: Exception | None = None  # a user's
        self.crew: list[Any] = []  # of one reference to name -> actor, since unpacking actors' handles imports torch
        self.version = 0  # of the crew
        self.begun = False  # the run's folder is made
        self.furthest = -1  # the last update that came back
        self.starts, self.size = 0, 0  # starts of the workers since then, those after a resize left out; how many
        self.awaited_since: float | None = None  # when workers were asked for that have not started yet
        self.trouble = ""  # the traceback that ended the workers, since their last start

    def put(self, news: dict[str, Any] | str) -> None:
        """An update's row, or something to say."""
        self.news.append(news)
        if isinstance(news, dict) and news["step"] > self.furthest:
            self.furthest, self.starts = news["step"], 0

    def take(self) -> list[dict[str, Any] | str]:
        news, self.news = self.news, []
        return news

    def begin(self) -> None:
        """Note that the run's folder is made: workers may write there."""
        self.begun = True

    def has_begun(self) -> bool:
        return self.begun

    def start(self, size: int) -> tuple[int, str]:
        """Note that so many workers start; how often they have since the last new update, and why they ended, if known.

        Another number of workers is a resize, which is no failure.
        """
        self.starts, self.size = self.starts + 1 if size == self.size else max(self.starts, 1), size
        trouble, self.trouble, self.awaited_since = self.trouble, "", None
        return self.starts, trouble

    def await_workers(self, text: str = "") -> None:
        """Note that workers are to start from now on, and why, unless the run has failed."""
        self.awaited_since = time.monotonic()
        self.news += [text] if text and not self.error else []

    def awaited_s(self) -> float:
        """For how long workers that were to start have not."""
        return 0.0 if self.awaited_since is None else time.monotonic() - self.awaited_since

    def started(self) -> bool:
        """Whether workers have their places, and the first rollout actors their engines."""
        return self.begun and (self.starts > 0 or self.furthest >= 0)

    def note_trouble(self, text: str) -> None:
        """Keep a worker's traceback; the first counts, since one that ends takes the others with it."""
        self.trouble = self.trouble or text

    def fail(self, error: Exception) -> None:
        """End the run with a user's error; the first one counts."""
        self.error = self.error or error

    def failure(self) -> Exception | None:
        return self.error

    def set_crew(self, crew: list[Any]) -> None:
        self.crew = crew
        self.version += 1

    def crew_since(self, version: int) -> tuple[int, list[Any]] | None:
        """The crew's version and reference; None if it is still that version."""
        return None if version == self.version else (self.version, self.crew)
