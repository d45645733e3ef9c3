"""Hands chunks of rollouts to members that come, go, die, fail and straggle. Knows nothing of Ray.

A result depends on its request and indices alone, so a chunk may be run again, or twice at once, anywhere: the first
result counts. A member has one chunk at a time, so at most one version of theta is being worked on. One thread owns
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

from rlr_ray.cluster.jobs import Chunk, Fate, Job, Member, Patience
from rlr_ray.core.zeroth_order import RolloutResult
from rlr_ray.errors import UserError

logger = logging.getLogger(__name__)
_TICK_S = 0.1  # between two looks at the clock
_LOOK_S = 1.0  # between two looks at who is there
_RETURN_S = 0.2  # until a lost member is asked again whether it is back
_SAY_S = 30.0  # between two words about the same trouble
_KEPT_DURATIONS = 101
_FAILURES = 2  # in a row, then a member is started anew


@dataclass(eq=False)
class _Call:
    job: Job
    chunk: Chunk
    member: Member
    started: float
    ended: bool = False  # by the time-out


class Dispatcher:
    """Runs jobs, one at a time, on whoever is there."""

    def __init__(
        self,
        look: Callable[[], Future[Sequence[Member] | None]],  # who is there; None: the same as before
        patience: Patience,
    ):
        self.look, self.patience = look, patience
        self.members: dict[str, Member] = {}  # by name
        self.idle: dict[str, Member] = {}
        self.gone: set[str] = set()
        self.busy: set[_Call] = set()
        self.to_ask: list[tuple[float, Member]] = []  # whether it is ready, from that time on
        self.asked: dict[str, float] = {}  # when a member that has not answered was asked
        self.failures: Counter[str] = Counter()  # of each member, in a row
        self.job: Job | None = None
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

        Iterating raises UserError if a rollout does on two members, or if a chunk went wrong more than `max_retries`
        times, wherever.
        """
        job = Job(request, chunks, name, self.patience.quorum, lambda job: self.events.put(lambda: self._over(job)))
        self.events.put(lambda: self._begin(job))
        return job

    def _serve(self) -> None:
        ticked = -math.inf
        while not self.closed:
            try:
                self._handle_events()
                now = time.monotonic()
                if now - ticked >= _TICK_S:
                    ticked = now
                    self._tick(now)
                self._assign()
            except Exception as error:  # a defect here must not leave the trainer waiting for ever
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

    def _over(self, job: Job) -> None:
        if self.job is job:
            self.job = None

    def _fail(self, error: BaseException) -> None:
        if self.job:
            self.job.done.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            self.job = None

    def _when(self, future: Future[Any], then: Callable[[Future[Any]], None]) -> None:
        future.add_done_callback(lambda done: self.events.put(lambda: then(done)))

    # --- members

    def _tick(self, now: float) -> None:
        if now - self.looked_at >= _LOOK_S and not self.looking:
            self.looked_at, self.looking = now, True
            self._when(self.look(), self._looked)
        due = [member for when, member in self.to_ask if when <= now]
        self.to_ask = [(when, member) for when, member in self.to_ask if when > now]
        for member in due:
            self._ask(member)
        late = now - self.patience.timeout_s
        for name in [name for name, when in self.asked.items() if when < late]:
            self._answer_late(name)
        for call in [call for call in self.busy if not call.ended and call.started < late]:
            self._time_out(call)
        if self.job:
            self._hedge(self.job, now)
            self._say_if_alone(now)

    def _looked(self, future: Future[Sequence[Member] | None]) -> None:
        self.looking = False
        found = None if future.exception() else future.result()
        if found is None:
            return
        there = {member.name: member for member in found}
        for name in self.members.keys() - there.keys():
            self._forget(self.members[name])
        for name in there.keys() - self.members.keys() - self.gone:
            self.members[name] = there[name]
            self._ask(there[name])

    def _is_there(self, member: Member) -> bool:
        return self.members.get(member.name) is member

    def _forget(self, member: Member) -> None:
        self.members.pop(member.name, None)
        self.idle.pop(member.name, None)

    def _ask(self, member: Member) -> None:
        if self._is_there(member):
            self.asked[member.name] = time.monotonic()
            self._when(member.ready(), lambda done: self._answered(member, done))

    def _answer_late(self, name: str) -> None:
        """End a member that does not even answer; it is asked again when it is lost."""
        del self.asked[name]
        if name in self.members:
            self.members[name].end()

    def _answered(self, member: Member, future: Future[Any]) -> None:
        error = future.exception()
        self.asked.pop(member.name, None)
        if not self._is_there(member):
            return
        if error is None:
            self.idle[member.name] = member
        elif member.fate(error) == "failed":
            logger.warning(f"rollout actor {member.name} cannot start, it is tried again: {error}")
            self._ask_later(member, _SAY_S)
        else:
            self._miss(member, member.fate(error))

    def _ask_later(self, member: Member, delay: float) -> None:
        self.to_ask.append((time.monotonic() + delay, member))

    def _miss(self, member: Member, fate: Fate | None) -> None:
        if fate == "gone":
            self.gone.add(member.name)
            self._forget(member)
        else:
            self._ask_later(member, _RETURN_S)

    def _say_if_alone(self, now: float) -> None:
        if self.idle or self.busy:
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
        """Give a chunk to an idle member where it has not failed; False if it waits for one of the others."""
        anyone = not chunk.failed_by or not self.members.keys() - chunk.failed_by
        name = next((name for name in self.idle if anyone or name not in chunk.failed_by), None)
        if name is None:
            return False
        call = _Call(job, chunk, self.idle.pop(name), time.monotonic())
        chunk.running += 1
        self.busy.add(call)
        self._when(call.member.run(job.request, chunk.indices), lambda done: self._returned(call, done))
        return True

    def _returned(self, call: _Call, future: Future[RolloutResult]) -> None:
        member, error = call.member, future.exception()
        self.busy.discard(call)
        removed, fate = not self._is_there(member), member.fate(error) if error else None
        if not removed:
            self._take_back(member, fate)
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
                call.chunk.failed_by.add(member.name)
            blameless = fate == "gone" or (removed and fate == "lost")  # with its node, say
            self._run_again(call, error, tries=0 if blameless else 1)

    def _take_back(self, member: Member, fate: Fate | None) -> None:
        """Have a member whose call is over idle, or ask it later. One that keeps failing starts anew."""
        self.failures[member.name] = self.failures[member.name] + 1 if fate == "failed" else 0
        if fate in ("lost", "gone"):
            self._miss(member, fate)
        elif self.failures[member.name] >= _FAILURES:
            self.failures[member.name] = 0
            member.end()
            self._ask_later(member, _RETURN_S)
        else:
            self.idle[member.name] = member

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
        """End a member that hangs; its chunk goes to another at once."""
        call.ended = True
        call.chunk.running -= 1
        call.member.end()
        if call.job is self.job and not call.chunk.finished:
            self._run_again(call, TimeoutError(f"no result within {self.patience.timeout_s:g} s"))

    def _hedge(self, job: Job, now: float) -> None:
        """Give idle members the chunks that take far longer than most."""
        if self.patience.hedge_after is None or job.waiting or not self.idle or not self.durations:
            return
        late = now - self.patience.hedge_after * statistics.median(self.durations)
        slow = [call for call in self.busy if call.started < late and call.job is job and not call.ended]
        alone = [call for call in slow if call.chunk.running == 1 and not call.chunk.finished]
        for call in sorted(alone, key=lambda call: call.started)[: len(self.idle)]:
            job.counts["rollouts_hedged"] += len(call.chunk.indices)
            self._start(job, call.chunk)


def _gave_up(name: str, tries: int, error: BaseException) -> UserError:
    return UserError(
        f"{name} went wrong {tries} times; the last: {type(error).__name__}: {error}\n"
        "if memory ran out, lower estimator.zeroth_order.chunk_size or cluster.rollouts.max_actors; if nothing came "
        "back, see what the reward waits for, or raise cluster.rollouts.timeout_s"
    )
