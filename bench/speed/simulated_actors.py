"""Actors that sleep instead of computing, as the dispatcher sees them."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import queue
import random
import threading
import time
from concurrent.futures import Future
from typing import Any

from rlr_ray.cluster.jobs import Fate
from rlr_ray.cluster.rollouts import actor_future
from rlr_ray.core.zeroth_order import RolloutResult

ROLLOUT_S, RESTART_S = 10.0, 5.0


class SimulatedDeath(Exception):
    """A slot's actor is gone; it is back after RESTART_S."""


def outcome(indices: range, dies: bool) -> RolloutResult:
    if dies:
        raise SimulatedDeath
    return RolloutResult(indices, [0.0] * len(indices), [0.0] * len(indices))


class Host:
    """Many simulated actors in one process of Ray's."""

    async def run(self, theta: bytes, indices: range, seconds: float, dies: bool) -> RolloutResult:
        await asyncio.sleep(seconds)
        return outcome(indices, dies)


class OverRay:
    """Calls to a host."""

    def __init__(self, host: Any):
        self.host = host

    def run(self, request: Any, indices: range, seconds: float, dies: bool = False) -> Future[RolloutResult]:
        return actor_future(self.host.run.remote(request, indices, seconds, dies))


class InProcess:
    """The same without calls: one thread that keeps everyone's time."""

    def __init__(self) -> None:
        self.number = itertools.count()
        self.asked: queue.SimpleQueue[tuple[float, int, range, bool, Future[RolloutResult]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def run(self, request: Any, indices: range, seconds: float, dies: bool = False) -> Future[RolloutResult]:
        future: Future[RolloutResult] = Future()
        self.asked.put((time.monotonic() + seconds, next(self.number), indices, dies, future))
        return future

    def _serve(self) -> None:
        sleeping: list[tuple[float, int, range, bool, Future[RolloutResult]]] = []
        while True:
            with contextlib.suppress(queue.Empty):
                heapq.heappush(sleeping, self.asked.get(timeout=0.001))
            while sleeping and sleeping[0][0] <= time.monotonic():
                *_, indices, dies, future = heapq.heappop(sleeping)
                try:
                    future.set_result(outcome(indices, dies))
                except SimulatedDeath as death:
                    future.set_exception(death)


class Slot:
    """A simulated actor as the dispatcher sees it; how long it takes and whether it dies follow from its seed."""

    def __init__(self, name: str, host: OverRay | InProcess, *, spread: bool, rollout_s: float = ROLLOUT_S):
        self.name, self.host, self.spread, self.random = name, host, spread, random.Random(name)
        self.rollout_s = rollout_s
        self.died = False
        self.durations: list[float] = []  # of its chunks that went well

    def ready(self) -> Future[Any]:
        return self.host.run(None, range(0), RESTART_S if self.died else 0.0)

    def run(self, request: Any, chunk: range) -> Future[RolloutResult]:
        seconds, dies = self.rollout_s, False
        if self.spread:  # 20 % up or down, 2 % stragglers that take ten times as long, 1 % die half-way
            seconds *= self.random.lognormvariate(0, 0.2) * (10 if self.random.random() < 0.02 else 1)
            dies = self.random.random() < 0.01
        self.durations += [] if dies else [seconds]
        return self.host.run(request, chunk, seconds / 2 if dies else seconds, dies)

    def end(self) -> None:
        raise AssertionError("nothing hangs here")

    def fate(self, error: BaseException) -> Fate:
        self.died = isinstance(error, SimulatedDeath)
        return "lost" if self.died else "failed"
