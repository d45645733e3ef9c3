"""The way from the leading worker to the driver. Imports nothing heavy: it is a process of its own."""

from __future__ import annotations

from typing import Any


class Mailbox:
    """Carries the updates' rows, what there is to say, and a user's error, from the leading worker to the driver."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.message: str | None = None

    def put(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows

    def say(self, text: str) -> None:
        self.texts.append(text)

    def take_texts(self) -> list[str]:
        texts, self.texts = self.texts, []
        return texts

    def fail(self, message: str) -> None:
        self.message = message

    def failure(self) -> str | None:
        return self.message
