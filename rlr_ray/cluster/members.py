"""What the dispatcher asks of those that run chunks."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Literal, Protocol

from rlr_ray.core.gradient import RolloutResult

Fate = Literal["lost", "gone", "failed"]  # it may come back; it never will; it is well, but the call raised an error


class Member(Protocol):
    """One that runs chunks, e.g. an actor."""

    name: str

    def ready(self) -> Future[Any]:
        """Done when it can take work."""

    def run(self, request: Any, chunk: range) -> Future[RolloutResult]:
        """Done with the chunk's result."""

    def end(self) -> None:
        """End what it is doing; it is lost then."""

    def fate(self, error: BaseException) -> Fate:
        """What a call that raised this says of the member."""
