"""Work that is handed out and came back, and the protocol of those who do it."""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rlr_ray.train.engine import Result

MAX_RETRIES = 4  # of a chunk, or of an actor that does not start


@dataclass(frozen=True)
class Patience:
    """When to go on, when to try again and when to give up."""

    quorum: float = 1.0  # share of a job's rollouts that it waits for, if it can do without the others
    hedge_after: float | None = 3.0  # medians until an idle worker is given a chunk too; None: never
    timeout_s: float = 600.0  # of one chunk
    max_retries: int = MAX_RETRIES  # of one chunk that lost its actor or failed


@dataclass(eq=False)
class Chunk:
    """Rollouts that are handed out together."""

    indices: range
    tries: int = 0  # that went wrong
    running: int = 0  # calls that it is in
    failed_by: set[str] = field(default_factory=set)  # names of workers where it raised an error
    finished: bool = False


class Job:
    """The chunks of a request. Iterating gives their results as they come; it ends early once a quorum is in.

    Whoever iterates and waits takes chunks that no worker is free for, and runs them by `here`, if that is given.
    """

    def __init__(
        self,
        request: Any,
        chunks: Sequence[range],
        name: Callable[[range], str],  # says which rollouts a chunk is, for errors
        quorum: float,
        wake: Callable[[], None],  # whoever hands out chunks
        *,
        kind: str = "",  # jobs of a kind take alike for a chunk
        here: Callable[[range], Result] | None = None,
    ):
        self.request, self.name, self.quorum, self.wake, self.kind, self.here = request, name, quorum, wake, kind, here
        self.waiting = deque(Chunk(indices) for indices in chunks)
        self.total = sum(map(len, chunks))  # rollouts
        self.done: queue.SimpleQueue[Result | Chunk | Exception] = queue.SimpleQueue()  # a chunk: to be run here
        self.hungry = False  # whoever iterates has nothing to do
        self.over = False
        self.counts = {"rollout_actors": 0, "rollouts_missing": 0, "rollouts_rerun": 0, "rollouts_hedged": 0}
        self.counts["rollouts_here"] = 0  # of those that came back, in the process that waits for them

    def cancel(self) -> None:
        """Have no more of it handed out."""
        self.over = True
        self.wake()

    def __iter__(self) -> Iterator[Any]:
        received, needed = 0, math.ceil(self.quorum * self.total)
        try:
            while received < self.total:
                try:
                    item = self._next(block=received < needed)
                except queue.Empty:
                    break
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Chunk):
                    item = self._run_here(item)
                received += len(item.indices)
                yield item
            self.counts["rollouts_missing"] = self.total - received
        finally:
            self.cancel()

    def _next(self, *, block: bool) -> Result | Chunk | Exception:
        """Raises queue.Empty if there is nothing and it is not to be waited for."""
        if block and self.here and self.done.empty():
            self.hungry = True
            self.wake()
        item = self.done.get(block=block)
        self.hungry = False
        return item

    def _run_here(self, chunk: Chunk) -> Result:
        assert self.here is not None
        result = self.here(chunk.indices)
        chunk.finished = True
        self.counts["rollouts_here"] += len(chunk.indices)
        return result


Fate = Literal["lost", "gone", "failed"]  # it may come back; it never will; it is well, but the call raised an error


class RolloutWorker(Protocol):
    """One that runs chunks, e.g. an actor."""

    name: str

    def ready(self) -> Future[Any]:
        """Done when it can take work."""

    def run(self, request: Any, chunks: Sequence[range]) -> Future[list[Any]]:
        """Done with the results of the chunks, one after the other."""

    def end(self) -> None:
        """End what it is doing; it is lost then."""

    def fate(self, error: BaseException) -> Fate:
        """What a call that raised this says of the worker."""
