"""What a user can mend."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Bad input. The message says what was found, what is allowed and the remedy; no traceback is shown."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class RewardCrashed(UserError):
    """A reward ended its process. It would do so again, so nothing is tried again."""


class OutOfMemory(UserError):
    """A run needs more memory than it may take. `peak_gib`: what it took, or asked for at the least."""

    def __init__(self, message: str, peak_gib: float):
        super().__init__(message)
        self.peak_gib = peak_gib

    def __reduce__(self) -> tuple[Any, ...]:
        return OutOfMemory, (str(self), self.peak_gib)
