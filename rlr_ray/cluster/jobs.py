"""One update's rollouts: what is to be done and came back, and the protocol of those who run them."""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rlr_ray.core.zeroth_order import RolloutResult

MAX_RETRIES = 4  # of a chunk, or of an actor that does not start


@dataclass(frozen=True)
class Patience:
    """When to go on, when to try again and when to give up."""

    quorum: float = 1.0  # share of a job's rollouts that it waits for
    hedge_after: float | None = 3.0  # medians until an idle worker is given a chunk too; None: never
    timeout_s: float = 600.0  # of one chunk
    max_retries: int = MAX_RETRIES  # of one chunk that lost its actor or failed


@dataclass(eq=False)
class Chunk:
    """Rollouts that are handed out together."""

    indices: range
    tries: int = 0  # that went wrong
    running: int = 0  # workers that have it
    failed_by: set[str] = field(default_factory=set)  # names of workers where it raised an error
    finished: bool = False


class Job:
    """The chunks of an update. Iterating gives their results as they come; it ends early once a quorum is in."""

    def __init__(
        self,
        request: Any,
        chunks: Sequence[range],
        name: Callable[[range], str],  # says which rollouts a chunk is, for errors
        quorum: float,
        over: Callable[[Job], None],
    ):
        self.request, self.name, self.quorum, self.over = request, name, quorum, over
        self.waiting = deque(Chunk(indices) for indices in chunks)
        self.total = sum(map(len, chunks))  # rollouts
        self.done: queue.SimpleQueue[RolloutResult | Exception] = queue.SimpleQueue()
        self.counts = {"rollout_actors": 0, "rollouts_missing": 0, "rollouts_rerun": 0, "rollouts_hedged": 0}

    def __iter__(self) -> Iterator[RolloutResult]:
        received, needed = 0, math.ceil(self.quorum * self.total)
        try:
            while received < self.total:
                try:
                    item = self.done.get(block=received < needed)
                except queue.Empty:
                    break
                if isinstance(item, Exception):
                    raise item
                received += len(item.indices)
                yield item
            self.counts["rollouts_missing"] = self.total - received
        finally:
            self.over(self)


Fate = Literal["lost", "gone", "failed"]  # it may come back; it never will; it is well, but the call raised an error


class RolloutWorker(Protocol):
    """One that runs chunks, e.g. an actor."""

    name: str

    def ready(self) -> Future[Any]:
        """Done when it can take work."""

    def run(self, request: Any, chunk: range) -> Future[RolloutResult]:
        """Done with the chunk's result."""

    def end(self) -> None:
        """End what it is doing; it is lost then."""

    def fate(self, error: BaseException) -> Fate:
        """What a call that raised this says of the worker."""
