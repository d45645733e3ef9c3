"""What a user can mend."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Bad input. The message says what was found, what is allowed and the remedy; no traceback is shown."""


class OutOfMemory(UserError):
    """A run needs more memory than it may take. `peak_gib`: what it took, or asked for at the least."""

    def __init__(self, message: str, peak_gib: float):
        super().__init__(message)
        self.peak_gib = peak_gib

    def __reduce__(self) -> tuple[Any, ...]:
        return OutOfMemory, (str(self), self.peak_gib)
