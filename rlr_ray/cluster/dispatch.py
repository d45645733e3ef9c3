"""Hands chunks of rollouts to workers that come, go, die, fail and straggle. Knows nothing of Ray.

A result depends on its request and indices alone, so a chunk may be run again, or twice at once, anywhere: the first
result counts. A worker has one chunk at a time, so at most one version of theta is being worked on. One thread owns
all of the state; whatever happens reaches it as an event.
"""

from __future__ import annotations

import logging
import math
import queue
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rlr_ray.cluster.jobs import Chunk, Fate, Job, Patience, RolloutWorker
from rlr_ray.core.zeroth_order import RolloutResult
from rlr_ray.errors import RewardCrashed, UserError

logger = logging.getLogger(__name__)
_TICK_S = 0.1  # between two looks at the clock
_LOOK_S = 1.0  # between two looks at who is there
_RETURN_S = 0.2  # until a lost worker is asked again whether it is back
_SAY_S = 30.0  # between two words about the same trouble
_KEPT_DURATIONS = 101
_FAILURES = 2  # in a row, then a worker is started anew


@dataclass(eq=False)
class _Call:
    job: Job
    chunk: Chunk
    worker: RolloutWorker
    started: float
    ended: bool = False  # by the time-out


class Dispatcher:
    """Runs jobs, one at a time, on whoever is there."""

    def __init__(
        self,
        look: Callable[[], Future[Sequence[RolloutWorker] | None]],  # who is there; None: the same as before
        patience: Patience,
    ):
        self.look, self.patience = look, patience
        self.workers: dict[str, RolloutWorker] = {}  # by name
        self.idle: dict[str, RolloutWorker] = {}
        self.gone: set[str] = set()
        self.busy: set[_Call] = set()
        self.to_ask: list[tuple[float, RolloutWorker]] = []  # whether it is ready, from that time on
        self.asked: dict[str, float] = {}  # when a worker that has not answered was asked
        self.failures: Counter[str] = Counter()  # of each worker, in a row
        self.job: Job | None = None
        self.crash: RewardCrashed | None = None  # no job can be done any more
        self.durations: deque[float] = deque(maxlen=_KEPT_DURATIONS)  # of chunks, s
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.looking, self.looked_at, self.alone_since = False, -math.inf, math.inf
        self.closed = False
        threading.Thread(target=self._serve, daemon=True, name="dispatcher").start()

    def close(self) -> None:
        """Hand out nothing more."""
        self.closed = True

    def submit(self, request: Any, chunks: Sequence[range], name: Callable[[range], str]) -> Job:
        """Start a job; the one before it is over. Its results come by iterating over it.

        Iterating raises UserError if a rollout does on two workers, or if a chunk went wrong more than `max_retries`
        times, wherever.
        """
        job = Job(request, chunks, name, self.patience.quorum, lambda job: self.events.put(lambda: self._over(job)))
        self.events.put(lambda: self._begin(job))
        return job

    def _serve(self) -> None:
        ticked, told = -math.inf, ""
        while not self.closed:
            try:
                self._handle_events()
                now = time.monotonic()
                if now - ticked >= _TICK_S:
                    ticked = now
                    self._tick(now)
                self._assign()
            except Exception as error:  # a defect here must not leave the trainer waiting for ever
                if not self.job and repr(error) != told:  # nobody to raise it
                    told = repr(error)
                    logger.exception("the dispatcher of rollouts failed between two jobs, and goes on")
                self._fail(error)

    def _handle_events(self) -> None:
        try:
            self.events.get(timeout=_TICK_S)()
            while not self.events.empty():
                self.events.get()()
        except queue.Empty:
            pass

    def _begin(self, job: Job) -> None:
        self.job, self.alone_since = job, math.inf
        if self.crash:
            self._fail(self.crash)

    def _over(self, job: Job) -> None:
        if self.job is job:
            self.job = None

    def _fail(self, error: BaseException) -> None:
        if self.job:
            self.job.done.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self.job = None

    def _when(self, future: Future[Any], then: Callable[[Future[Any]], None]) -> None:
        future.add_done_callback(lambda done: self.events.put(lambda: then(done)))

    # --- workers

    def _tick(self, now: float) -> None:
        if now - self.looked_at >= _LOOK_S and not self.looking:
            self.looked_at = now
            self._when(self.look(), self._looked)
            self.looking = True
        due = [worker for when, worker in self.to_ask if when <= now]
        self.to_ask = [(when, worker) for when, worker in self.to_ask if when > now]
        for worker in due:
            self._ask(worker)
        late = now - self.patience.timeout_s
        for name in [name for name, when in self.asked.items() if when < late]:
            del self.asked[name]
            if name in self.workers:  # it is asked again when it is lost
                self.workers[name].end()
        for call in [call for call in self.busy if not call.ended and call.started < late]:
            self._time_out(call)
        if self.job:
            self._hedge(self.job, now)
            self._say_if_alone(now)

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

    def _is_there(self, worker: RolloutWorker) -> bool:
        return self.workers.get(worker.name) is worker

    def _forget(self, worker: RolloutWorker) -> None:
        self.workers.pop(worker.name, None)
        self.idle.pop(worker.name, None)

    def _ask(self, worker: RolloutWorker) -> None:
        if self._is_there(worker):
            self.asked[worker.name] = time.monotonic()
            self._when(worker.ready(), lambda done: self._answered(worker, done))

    def _answered(self, worker: RolloutWorker, future: Future[Any]) -> None:
        error = future.exception()
        self.asked.pop(worker.name, None)
        if not self._is_there(worker):
            return
        if error is None:
            self.idle[worker.name] = worker
        elif isinstance(error, RewardCrashed):
            self.crash = error
            self._fail(error)
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

    def _say_if_alone(self, now: float) -> None:
        if self.idle or any(not call.ended for call in self.busy):
            self.alone_since = math.inf
        elif self.alone_since == math.inf:
            self.alone_since = now
        elif now - self.alone_since > _SAY_S:
            self.alone_since = now
            logger.warning("waiting for a rollout actor: none is there; the update goes on once one is")

    # --- chunks

    def _assign(self) -> None:
        for _ in range(len(self.job.waiting) if self.job else 0):
            if not self.job or not self.idle:
                return
            chunk = self.job.waiting.popleft()
            if not self._start(self.job, chunk):
                self.job.waiting.append(chunk)

    def _start(self, job: Job, chunk: Chunk) -> bool:
        """Give a chunk to an idle worker where it has not failed; False if it waits for one of the others."""
        anyone = not chunk.failed_by or not self.workers.keys() - chunk.failed_by
        name = next((name for name in self.idle if anyone or name not in chunk.failed_by), None)
        if name is None:
            return False
        call = _Call(job, chunk, self.idle.pop(name), time.monotonic())
        chunk.running += 1
        self.busy.add(call)
        self._when(call.worker.run(job.request, chunk.indices), lambda done: self._returned(call, done))
        return True

    def _returned(self, call: _Call, future: Future[RolloutResult]) -> None:
        worker, error = call.worker, future.exception()
        self.busy.discard(call)
        removed, fate = not self._is_there(worker), worker.fate(error) if error else None
        if not removed:
            self._take_back(worker, fate)
        if call.ended:
            return
        call.chunk.running -= 1
        if call.job is not self.job or call.chunk.finished:
            return
        if error is None:
            self._finish(call, future.result())
        elif isinstance(error, UserError) and call.chunk.failed_by:  # the same elsewhere
            self._fail(error)
        else:
            if fate == "failed":
                call.chunk.failed_by.add(worker.name)
            blameless = fate == "gone" or (removed and fate == "lost")  # with its node, say
            self._run_again(call, error, tries=0 if blameless else 1)

    def _take_back(self, worker: RolloutWorker, fate: Fate | None) -> None:
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

    def _finish(self, call: _Call, result: RolloutResult) -> None:
        call.chunk.finished = True
        self.durations.append(time.monotonic() - call.started)
        call.job.counts["rollout_actors"] = len(self.idle) + len(self.busy)
        call.job.done.put(result)

    def _run_again(self, call: _Call, error: BaseException, tries: int = 1) -> None:
        chunk, job = call.chunk, call.job
        chunk.tries += tries
        job.counts["rollouts_rerun"] += len(chunk.indices)
        if chunk.tries > self.patience.max_retries:
            self._fail(_gave_up(job.name(chunk.indices), chunk.tries, error))
        elif not chunk.running:
            job.waiting.appendleft(chunk)

    def _time_out(self, call: _Call) -> None:
        """End a worker that hangs; its chunk goes to another at once."""
        call.ended = True
        call.chunk.running -= 1
        call.worker.end()
        if call.job is self.job and not call.chunk.finished:
            self._run_again(call, TimeoutError(f"no result within {self.patience.timeout_s:g} s"))

    def _hedge(self, job: Job, now: float) -> None:
        """Give idle workers the chunks that take far longer than most."""
        if self.patience.hedge_after is None or job.waiting or not self.idle or not self.durations:
            return
        late = now - self.patience.hedge_after * statistics.median(self.durations)
        slow = [call for call in self.busy if call.started < late and call.job is job and not call.ended]
        alone = [call for call in slow if call.chunk.running == 1 and not call.chunk.finished]
        for call in sorted(alone, key=lambda call: call.started)[: len(self.idle)]:
            if self._start(job, call.chunk):
                job.counts["rollouts_hedged"] += len(call.chunk.indices)


def _gave_up(name: str, tries: int, error: BaseException) -> UserError:
    return UserError(
        f"{name} went wrong {tries} times; the last: {type(error).__name__}: {error}\n"
        "if memory ran out, lower estimator.zeroth_order.chunk_size or cluster.rollouts.max_actors; if nothing came "
        "back, see what the reward waits for, or raise cluster.rollouts.timeout_s"
    )
