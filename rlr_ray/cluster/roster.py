"""Who is there to work: workers that come, answer, are lost and come back, fail and are started anew."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from rlr_ray.cluster.jobs import Fate, RolloutWorker
from rlr_ray.errors import RewardCrashed

logger = logging.getLogger(__name__)
_LOOK_S = 1.0  # between two looks at who is there
_RETURN_S = 0.2  # until a lost worker is asked again whether it is back
_SAY_S = 30.0  # until one that could not start is asked again, saying so
_FAILURES = 2  # in a row, then a worker is started anew


class Roster:
    """The workers by name, and which of them have nothing to do. Used by one thread, which `when` calls back."""

    def __init__(
        self,
        look: Callable[[], Future[Sequence[RolloutWorker] | None]],  # who is there; None: the same as before
        when: Callable[[Future[Any], Callable[[Future[Any]], None]], None],  # done, have this thread call that
        crashed: Callable[[RewardCrashed], None],  # is told that no worker can do any work any more
    ):
        self.look, self.when, self.crashed = look, when, crashed
        self.workers: dict[str, RolloutWorker] = {}  # by name
        self.idle: dict[str, RolloutWorker] = {}
        self.gone: set[str] = set()
        self.to_ask: list[tuple[float, RolloutWorker]] = []  # whether it is ready, from that time on
        self.asked: dict[str, float] = {}  # when a worker that has not answered was asked
        self.failures: Counter[str] = Counter()  # of each worker, in a row
        self.looking, self.looked_at = False, -math.inf

    def has(self, worker: RolloutWorker) -> bool:
        return self.workers.get(worker.name) is worker

    def tick(self, now: float, limit_s: float) -> None:
        """Look who is there, ask those who may be back, and end those who do not answer within the limit."""
        if now - self.looked_at >= _LOOK_S and not self.looking:
            self.looked_at = now
            self.when(self.look(), self._looked)
            self.looking = True
        due = [worker for when, worker in self.to_ask if when <= now]
        self.to_ask = [(when, worker) for when, worker in self.to_ask if when > now]
        for worker in due:
            self._ask(worker)
        for name in [name for name, when in self.asked.items() if when < now - limit_s]:
            del self.asked[name]
            if name in self.workers:  # it is asked again when it is lost
                self.workers[name].end()

    def take_back(self, worker: RolloutWorker, fate: Fate | None) -> None:
        """Have a worker whose call is over idle, or ask it later. One that keeps failing starts anew."""
        self.failures[worker.name] = self.failures[worker.name] + 1 if fate == "failed" else 0
        if fate in ("lost", "gone"):
            self._miss(worker, fate)
        elif self.failures[worker.name] >= _FAILURES:
            self.failures[worker.name] = 0
            worker.end()
            self._ask_later(worker, _RETURN_S)
        else:
            self.idle[worker.name] = worker

    def _looked(self, future: Future[Sequence[RolloutWorker] | None]) -> None:
        self.looking = False
        workers = None if future.exception() else future.result()
        if workers is None:
            return
        there = {worker.name: worker for worker in workers}
        for name in self.workers.keys() - there.keys():
            self._forget(self.workers[name])
        for name, worker in there.items():  # in their order: no set, whose order differs between processes
            if name not in self.workers and name not in self.gone:
                self.workers[name] = worker
                self._ask(worker)

    def _forget(self, worker: RolloutWorker) -> None:
        self.workers.pop(worker.name, None)
        self.idle.pop(worker.name, None)

    def _ask(self, worker: RolloutWorker) -> None:
        if self.has(worker):
            self.asked[worker.name] = time.monotonic()
            self.when(worker.ready(), lambda done: self._answered(worker, done))

    def _answered(self, worker: RolloutWorker, future: Future[Any]) -> None:
        error = future.exception()
        self.asked.pop(worker.name, None)
        if not self.has(worker):
            return
        if error is None:
            self.idle[worker.name] = worker
        elif isinstance(error, RewardCrashed):
            self.crashed(error)
        elif worker.fate(error) == "failed":
            logger.warning(f"rollout actor {worker.name} cannot start, it is tried again: {error}")
            self._ask_later(worker, _SAY_S)
        else:
            self._miss(worker, worker.fate(error))

    def _ask_later(self, worker: RolloutWorker, delay: float) -> None:
        self.to_ask.append((time.monotonic() + delay, worker))

    def _miss(self, worker: RolloutWorker, fate: Fate | None) -> None:
        if fate == "gone":
            self.gone.add(worker.name)
            self._forget(worker)
        else:
            self._ask_later(worker, _RETURN_S)
