"""Hands chunks of work to workers that come, go, die, fail and straggle. Knows nothing of Ray.

A result depends on its request and indices alone, so a chunk may be run again, or twice at once, anywhere: the first
result counts. A worker has one call at a time, of one request: at most one version of theta is being worked on. One
thread owns all of the state; whatever happens reaches it as an event.
"""

from __future__ import annotations

import logging
import math
import queue
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rlr_ray.cluster.jobs import Chunk, Job, Patience, RolloutWorker
from rlr_ray.cluster.roster import Roster
from rlr_ray.errors import RewardCrashed, UserError
from rlr_ray.train.engine import Result

logger = logging.getLogger(__name__)
_TICK_S = 0.1  # between two looks at the clock
_SAY_S = 30.0  # between two words about the same trouble
_KEPT_DURATIONS = 101
_CALL_S = 0.5  # that a call is to last at least, where there are chunks enough: a call costs milliseconds
_TURNS = 4  # calls that each worker gets of a job at least, so that all end about at once


@dataclass(eq=False)
class _Call:
    job: Job
    chunks: list[Chunk]
    worker: RolloutWorker
    started: float
    ended: bool = False  # by the time-out

    @property
    def open(self) -> list[Chunk]:
        """Those whose result still counts."""
        return [chunk for chunk in self.chunks if not chunk.finished]


class Dispatcher:
    """Runs jobs on whoever is there, the chunks of the oldest first."""

    def __init__(
        self,
        look: Callable[[], Future[Sequence[RolloutWorker] | None]],  # who is there; None: the same as before
        patience: Patience,
    ):
        self.patience, self.roster = patience, Roster(look, self._when, self._crashed)
        self.busy: set[_Call] = set()
        self.jobs: list[Job] = []
        self.crash: RewardCrashed | None = None  # no job can be done any more
        self.durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_DURATIONS))  # of chunks, s
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.alone_since = math.inf
        self.closed = False
        threading.Thread(target=self._serve, daemon=True, name="dispatcher").start()

    def close(self) -> None:
        """Hand out nothing more."""
        self.closed = True

    def submit(
        self,
        request: Any,
        chunks: Sequence[range],
        name: Callable[[range], str],
        *,
        kind: str = "",
        partial: bool = True,
        here: Callable[[range], Result] | None = None,
    ) -> Job:
        """Start a job, behind those that are not over. Its results come by iterating over it.

        `kind`: such jobs' chunks take alike; `partial`: it may end with a quorum; `here` runs a chunk in the process
        that waits. Iterating raises UserError if a rollout does on two workers, or if a chunk went wrong more than
        `max_retries` times, wherever.
        """
        quorum = self.patience.quorum if partial else 1.0
        job = Job(request, chunks, name, quorum, lambda: self.events.put(lambda: None), kind=kind, here=here)
        self.events.put(lambda: self._begin(job))
        return job

    def _serve(self) -> None:
        ticked, told = -math.inf, ""
        while not self.closed:
            try:
                self._handle_events()
                self.jobs = [job for job in self.jobs if not job.over]
                now = time.monotonic()
                if now - ticked >= _TICK_S:
                    ticked = now
                    self._tick(now)
                self._assign()
            except Exception as error:  # a defect here must not leave the trainer waiting for ever
                if not self.jobs and repr(error) != told:  # nobody to raise it
                    told = repr(error)
                    logger.exception("the dispatcher of rollouts failed between two jobs, and goes on")
                for job in list(self.jobs):
                    self._fail(job, error)

    def _handle_events(self) -> None:
        try:
            self.events.get(timeout=_TICK_S)()
            while not self.events.empty():
                self.events.get()()
        except queue.Empty:
            pass

    def _begin(self, job: Job) -> None:
        self.jobs.append(job)
        self.alone_since = math.inf
        if self.crash:
            self._fail(job, self.crash)

    def _crashed(self, error: RewardCrashed) -> None:
        self.crash = error
        for job in list(self.jobs):
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        if job in self.jobs:
            job.done.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self.jobs.remove(job)

    def _when(self, future: Future[Any], then: Callable[[Future[Any]], None]) -> None:
        future.add_done_callback(lambda done: self.events.put(lambda: then(done)))

    def _tick(self, now: float) -> None:
        limit = self.patience.timeout_s
        self.roster.tick(now, limit)
        for call in [call for call in self.busy if not call.ended and call.started < now - limit * len(call.chunks)]:
            self._time_out(call)
        if self.jobs and not any(job.waiting for job in self.jobs):
            for job in self.jobs:
                self._hedge(job, now)
        if self.jobs:
            self._say_if_alone(now)

    def _say_if_alone(self, now: float) -> None:
        if self.roster.idle or any(not call.ended for call in self.busy) or any(job.here for job in self.jobs):
            self.alone_since = math.inf
        elif self.alone_since == math.inf:
            self.alone_since = now
        elif now - self.alone_since > _SAY_S:
            self.alone_since = now
            logger.warning("waiting for a rollout actor: none is there; the update goes on once one is")

    def _assign(self) -> None:
        for job in list(self.jobs):
            for _ in range(len(job.waiting)):
                if not self.roster.idle or not job.waiting:
                    break
                chunks = [job.waiting.popleft() for _ in range(self._together(job))]
                if not self._start(job, chunks):
                    job.waiting.extend(chunks)
            if job.waiting and job.hungry:
                chunk, job.hungry = job.waiting.popleft(), False
                chunk.running += 1
                job.done.put(chunk)

    def _together(self, job: Job) -> int:
        """Chunks of the next call: one that has gone wrong goes alone, as do those of unknown length."""
        fresh = next((i for i, chunk in enumerate(job.waiting) if chunk.tries or chunk.failed_by), len(job.waiting))
        durations = self.durations[job.kind]
        if not durations or fresh < 2:
            return 1
        enough = math.ceil(_CALL_S / max(statistics.median(durations), 1e-6))
        share = len(job.waiting) // (_TURNS * max(len(self.roster.workers), 1))
        return max(1, min(enough, share, fresh))

    def _start(self, job: Job, chunks: list[Chunk]) -> bool:
        """Give chunks to an idle worker where none has failed; False if they wait for one of the others."""
        failed_by = set[str]().union(*(chunk.failed_by for chunk in chunks))
        anyone = not failed_by or not self.roster.workers.keys() - failed_by
        name = next((name for name in self.roster.idle if anyone or name not in failed_by), None)
        if name is None:
            return False
        call = _Call(job, chunks, self.roster.idle.pop(name), time.monotonic())
        for chunk in chunks:
            chunk.running += 1
        self.busy.add(call)
        indices = [chunk.indices for chunk in chunks]
        self._when(call.worker.run(job.request, indices), lambda done: self._returned(call, done))
        return True

    def _returned(self, call: _Call, future: Future[list[Any]]) -> None:
        worker, error = call.worker, future.exception()
        self.busy.discard(call)
        removed, fate = not self.roster.has(worker), worker.fate(error) if error else None
        if not removed:
            self.roster.take_back(worker, fate)
        if call.ended:
            return
        for chunk in call.chunks:
            chunk.running -= 1
        if call.job not in self.jobs:
            return
        if error is None:
            self._finish(call, future.result())
        elif isinstance(error, UserError) and any(chunk.failed_by for chunk in call.open):  # the same elsewhere
            self._fail(call.job, error)
        else:
            for chunk in call.open if fate == "failed" else ():
                chunk.failed_by.add(worker.name)
            blameless = fate == "gone" or (removed and fate == "lost")  # with its node, say
            self._run_again(call, error, tries=0 if blameless else 1)

    def _finish(self, call: _Call, results: Sequence[Any]) -> None:
        self.durations[call.job.kind].append((time.monotonic() - call.started) / len(call.chunks))
        call.job.counts["rollout_actors"] = len(self.roster.idle) + len(self.busy)
        for chunk, result in zip(call.chunks, results, strict=True):
            if not chunk.finished:
                chunk.finished = True
                call.job.done.put(result)

    def _run_again(self, call: _Call, error: BaseException, tries: int = 1) -> None:
        job = call.job
        for chunk in reversed(call.open):
            chunk.tries += tries
            job.counts["rollouts_rerun"] += len(chunk.indices)
            if chunk.tries > self.patience.max_retries:
                self._fail(job, _gave_up(job.name(chunk.indices), chunk.tries, error))
            elif not chunk.running:
                job.waiting.appendleft(chunk)

    def _time_out(self, call: _Call) -> None:
        """End a worker that hangs; its chunk goes to another at once."""
        call.ended = True
        for chunk in call.chunks:
            chunk.running -= 1
        call.worker.end()
        if call.job in self.jobs:
            limit = self.patience.timeout_s * len(call.chunks)
            self._run_again(call, TimeoutError(f"no result within {limit:g} s"))

    def _hedge(self, job: Job, now: float) -> None:
        """Give idle workers the chunks that take far longer than most."""
        durations = self.durations[job.kind]
        if self.patience.hedge_after is None or not self.roster.idle or not durations:
            return
        patient = self.patience.hedge_after * statistics.median(durations)
        slow = [call for call in self.busy if call.job is job and not call.ended]
        slow = [call for call in slow if call.started < now - patient * len(call.chunks)]
        alone = [call for call in slow if call.open and all(chunk.running == 1 for chunk in call.open)]
        for call in sorted(alone, key=lambda call: call.started)[: len(self.roster.idle)]:
            if self._start(job, call.open):
                job.counts["rollouts_hedged"] += sum(len(chunk.indices) for chunk in call.open)


def _gave_up(name: str, tries: int, error: BaseException) -> UserError:
    return UserError(
        f"{name} went wrong {tries} times; the last: {type(error).__name__}: {error}\n"
        "if memory ran out, lower estimator.zeroth_order.chunk_size or cluster.rollouts.max_actors; if nothing came "
        "back, see what the reward waits for, or raise cluster.rollouts.timeout_s"
    )
