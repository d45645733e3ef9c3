"""The dispatcher against workers that come, go, die, fail, hang and straggle; no Ray, no processes."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest

from rlr_ray.cluster import dispatch, roster
from rlr_ray.cluster.dispatch import Dispatcher
from rlr_ray.cluster.jobs import Fate, Patience, RolloutWorker
from rlr_ray.core.zeroth_order import RolloutResult
from rlr_ray.errors import UserError
from tests.runs import logged

CHUNKS = [range(first, first + 2) for first in range(0, 12, 2)]
FAST = Patience(hedge_after=None, timeout_s=5, max_retries=2)


class Lost(Exception):
    pass


class Gone(Exception):
    pass


class Fake:
    """Answers at once; `plan` gives what its first runs do instead: raise an error, or None: hang until `release`."""

    def __init__(self, name: str, *plan: Exception | None, delay_s: float = 0.0):
        self.name, self.plan, self.delay_s = name, list(plan), delay_s
        self.calls: list[tuple[Any, range]] = []
        self.sizes: list[int] = []  # of each call
        self.ended = 0
        self.hanging: Future[list[RolloutResult]] = Future()

    def ready(self) -> Future[None]:
        return _done(None)

    def run(self, request: Any, chunks: Sequence[range]) -> Future[list[RolloutResult]]:
        self.calls += [(request, chunk) for chunk in chunks]
        self.sizes.append(len(chunks))
        future: Future[list[RolloutResult]] = Future()
        if self.plan:
            action = self.plan.pop(0)
            if action is None:
                self.hanging = future
            else:
                future.set_exception(action)
        elif self.delay_s:
            threading.Timer(self.delay_s, future.set_result, (list(map(_result, chunks)),)).start()
        else:
            future.set_result(list(map(_result, chunks)))
        return future

    def release(self) -> None:
        self.hanging.set_result([_result(self.calls[-1][1])])

    def end(self) -> None:
        self.ended += 1
        if not self.hanging.done():
            self.hanging.set_exception(Lost())

    def fate(self, error: BaseException) -> Fate:
        return "lost" if isinstance(error, Lost) else "gone" if isinstance(error, Gone) else "failed"


def _result(chunk: range) -> RolloutResult:
    return RolloutResult(chunk, [float(index) for index in chunk], [-float(index) for index in chunk])


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Workers:
    def __init__(self, *workers: RolloutWorker):
        self.workers: Sequence[RolloutWorker] = workers

    def look(self) -> Future[Sequence[RolloutWorker] | None]:
        return _done(self.workers)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a chunk a call, unless a test has it otherwise: those here take no time."""
    for name, seconds in {"_TICK_S": 0.01, "_SAY_S": 0.2, "_CALL_S": 0.0}.items():
        monkeypatch.setattr(dispatch, name, seconds)
    for name, seconds in {"_LOOK_S": 0.02, "_RETURN_S": 0.02, "_SAY_S": 0.2}.items():
        monkeypatch.setattr(roster, name, seconds)


def run(actors: Workers, patience: Patience = FAST) -> tuple[list[range], dict[str, int]]:
    """The chunks that came back, in order, and the counts."""
    with contextlib.closing(Dispatcher(actors.look, patience)) as dispatcher:
        job = dispatcher.submit("theta", CHUNKS, lambda chunk: f"rollouts {chunk.start} to {chunk.stop - 1}")
        return sorted((result.indices for result in job), key=lambda chunk: chunk.start), job.counts


def test_every_chunk_comes_back_once() -> None:
    workers = [Fake("a", delay_s=0.01), Fake("b", delay_s=0.01), Fake("c", delay_s=0.01)]
    chunks, counts = run(Workers(*workers))
    assert chunks == CHUNKS
    calls = [chunk for worker in workers for _, chunk in worker.calls]
    assert sorted(calls, key=lambda chunk: chunk.start) == CHUNKS
    assert counts["rollouts_missing"] == counts["rollouts_rerun"] == counts["rollouts_hedged"] == 0


def test_the_chunk_of_a_lost_worker_runs_again_and_the_worker_is_used_again() -> None:
    lost = Fake("a", Lost())
    chunks, counts = run(Workers(lost))
    assert chunks == CHUNKS and counts["rollouts_rerun"] == 2
    assert len(lost.calls) == 7


def test_workers_that_are_gone_are_not_asked_again_and_cost_a_chunk_no_tries() -> None:
    gone, other = [Fake(f"gone-{n}", Gone()) for n in range(5)], Fake("last", delay_s=0.05)
    chunks, counts = run(Workers(*gone, other), dataclasses.replace(FAST, max_retries=0))
    assert chunks == CHUNKS and counts["rollouts_rerun"] == 2 * 5
    assert [len(worker.calls) for worker in gone] == [1] * 5


DARK, HANGS = UserError("the reward is not finite"), Patience(timeout_s=0.1, max_retries=1)


@pytest.mark.parametrize(
    ("names", "action", "patience", "words"),
    [
        ("ab", RuntimeError("the seventh pixel"), FAST, r"rollouts \d+ to \d+ went wrong 3 times.*: the seventh pixel"),
        ("ab", DARK, FAST, "^the reward is not finite$"),  # of two workers, or twice of the only one
        ("a", DARK, FAST, "^the reward is not finite$"),
        ("a", None, HANGS, r"went wrong 2 times; the last: TimeoutError: no result within 0\.1 s"),
    ],
    ids=["an error", "a user's", "a user's, alone", "hangs"],
)
def test_a_chunk_that_always_goes_wrong_ends_the_job_saying_so(
    names: str, action: Exception | None, patience: Patience, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(Workers(*[Fake(name, *[action] * 9) for name in names]), patience)


def test_a_users_error_of_one_worker_is_tried_on_another() -> None:
    """A GPU's memory that ran out, say, may be that worker's alone."""
    short = Fake("a", UserError("the GPU's memory ran out"))
    other = Fake("b", delay_s=0.05)
    assert run(Workers(short, other))[0] == CHUNKS
    first = short.calls[0][1]
    assert [chunk for _, chunk in short.calls].count(first) == 1
    assert first in [chunk for _, chunk in other.calls]


def test_a_worker_that_is_broken_costs_no_chunk_its_tries() -> None:
    broken, other = Fake("a", *[RuntimeError("sticky")] * 99), Fake("b", delay_s=0.02)
    chunks, counts = run(Workers(broken, other), Patience(max_retries=1, hedge_after=None))
    assert chunks == CHUNKS
    assert broken.ended == counts["rollouts_rerun"] // 2 // 2  # started anew after two failures in a row


def test_a_worker_that_hangs_is_ended_and_its_chunk_runs_elsewhere() -> None:
    hangs, other = Fake("a", None), Fake("b")
    chunks, counts = run(Workers(hangs, other), Patience(hedge_after=None, timeout_s=0.5))
    assert chunks == CHUNKS and hangs.ended == 1 and counts["rollouts_rerun"] == 2


def test_an_idle_worker_takes_the_chunk_of_a_straggler_whose_late_result_does_not_count() -> None:
    straggler, other = Fake("a", None), Fake("b", delay_s=0.01)
    chunks, counts = run(Workers(straggler, other), Patience(hedge_after=3.0))  # ends, though one never comes back
    assert chunks == CHUNKS and counts["rollouts_hedged"] == 2 and counts["rollouts_rerun"] == 0
    straggler.release()


def test_a_chunk_that_comes_back_twice_counts_once() -> None:
    """The straggler's result comes with that of who took its chunk, and before another straggler's."""
    straggler, other = Fake("a", None), Fake("c", None)

    class Taker(Fake):
        def run(self, request: Any, chunks: Sequence[range]) -> Future[list[RolloutResult]]:
            if straggler.calls and straggler.calls[0][1] in chunks:
                straggler.release()
            return super().run(request, chunks)

    chunks, counts = run(Workers(straggler, Taker("b"), other), Patience(hedge_after=3.0))
    assert chunks == CHUNKS and counts["rollouts_hedged"] == 4
    other.release()


def test_a_chunk_that_no_idle_worker_may_take_counts_as_no_hedge() -> None:
    """It failed at the idle one and hangs at the other."""
    failed = Fake("a", RuntimeError("odd"))

    class Hangs(Fake):
        def run(self, request: Any, chunks: Sequence[range]) -> Future[list[RolloutResult]]:
            self.plan = [None] if failed.calls and failed.calls[0][1] in chunks else []
            return super().run(request, chunks)

    hangs = Hangs("b")
    threading.Timer(0.5, hangs.release).start()
    chunks, counts = run(Workers(failed, hangs), Patience(hedge_after=3.0))
    assert chunks == CHUNKS and counts["rollouts_rerun"] == 2 and counts["rollouts_hedged"] == 0


def test_without_hedging_the_straggler_is_waited_for() -> None:
    straggler, other = Fake("a", None), Fake("b")
    released = threading.Event()
    threading.Timer(0.5, lambda: (released.set(), straggler.release())).start()
    assert run(Workers(straggler, other))[1]["rollouts_hedged"] == 0
    assert released.is_set()


def test_with_a_quorum_the_job_goes_on_without_late_ones_and_says_how_many() -> None:
    chunks, counts = run(Workers(Fake("a", None), Fake("b")), Patience(quorum=0.8, hedge_after=None))
    assert len(chunks) == 5 and counts["rollouts_missing"] == 2


def test_a_worker_with_an_older_job_gets_nothing_of_the_next_until_it_is_back() -> None:
    late, other = Fake("a", None), Fake("b")
    dispatcher = Dispatcher(Workers(late, other).look, Patience(quorum=0.8, hedge_after=None))
    first = [result.indices for result in dispatcher.submit("first", CHUNKS, str)]
    second = [result.indices for result in dispatcher.submit("second", CHUNKS, str)]
    assert len(first) == 5 and len(set(second)) == len(second) >= 5
    assert [request for request, _ in late.calls] == ["first"]  # at most one version of theta at a worker
    late.release()
    third = [result.indices for result in dispatcher.submit("third", CHUNKS, str)]
    assert len(set(third)) == len(third) >= 5  # its late result counted for none
    dispatcher.close()


def test_workers_that_come_and_go_during_a_job() -> None:
    first, second = Fake("a", None), Fake("b")
    actors = Workers(first)
    threading.Timer(0.3, lambda: setattr(actors, "workers", (second,))).start()
    threading.Timer(0.6, lambda: first.hanging.set_exception(Gone())).start()
    assert run(actors)[0] == CHUNKS
    assert len(first.calls) == 1 and len(second.calls) == 6


def test_a_job_without_workers_waits_saying_so() -> None:
    actors = Workers()
    threading.Timer(0.5, lambda: setattr(actors, "workers", (Fake("a"),))).start()
    with logged() as said:
        assert run(actors)[0] == CHUNKS
    assert said and "none is there" in said[0]


def test_a_worker_that_does_not_end_when_it_is_ended_is_not_there() -> None:
    class Stuck(Fake):
        def end(self) -> None:
            self.ended += 1

    stuck = Stuck("a", None)
    threading.Timer(0.8, stuck.release).start()
    with logged() as said:
        assert run(Workers(stuck), Patience(timeout_s=0.1))[0] == CHUNKS
    assert said and "none is there" in said[0]


def test_a_worker_that_never_answers_is_started_anew() -> None:
    class Mute(Fake):
        asked: ClassVar[list[Future[None]]] = []

        def ready(self) -> Future[None]:
            self.asked.append(Future())
            return self.asked[-1] if len(self.asked) == 1 else _done(None)

        def end(self) -> None:
            self.ended += 1
            self.asked[0].set_exception(Lost())

    mute = Mute("a")
    assert run(Workers(mute), Patience(timeout_s=0.2))[0] == CHUNKS
    assert mute.ended == 1


def test_a_worker_that_cannot_start_is_reported_and_tried_again() -> None:
    class Broken(Fake):
        starts = 0

        def ready(self) -> Future[None]:
            self.starts += 1
            future: Future[None] = Future()
            if self.starts == 1:
                future.set_exception(RuntimeError("no memory left"))
            else:
                future.set_result(None)
            return future

    with logged() as said:
        assert run(Workers(Broken("a")))[0] == CHUNKS
    assert "actor a cannot start, it is tried again: no memory left" in said[0]


def test_an_error_between_jobs_is_logged_and_the_next_job_runs() -> None:
    """Also of a look at who is there, which is looked at again."""
    looks = [0]

    def look() -> Future[Sequence[RolloutWorker] | None]:
        looks[0] += 1
        if looks[0] < 4:
            raise OSError("no route")
        return _done((Fake("a"),))

    with logged() as said, contextlib.closing(Dispatcher(look, FAST)) as dispatcher:
        while looks[0] < 4:
            time.sleep(0.01)
        job = dispatcher.submit("theta", CHUNKS, str)
        assert len(list(job)) == len(CHUNKS)
    assert len(said) == 1 and "between two jobs" in said[0]


MANY = [range(first, first + 2) for first in range(0, 400, 2)]


def test_short_chunks_are_called_for_several_at_a_time_and_all_workers_end_about_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 chunks for two workers: the first alone, later at most a quarter of a worker's share of what is left."""
    monkeypatch.setattr(dispatch, "_CALL_S", 5.0)
    workers = [Fake("a", delay_s=0.01), Fake("b", delay_s=0.01)]
    with contextlib.closing(Dispatcher(Workers(*workers).look, FAST)) as dispatcher:
        job = dispatcher.submit("theta", MANY, str)
        assert sorted((result.indices for result in job), key=lambda chunk: chunk.start) == MANY
    sizes = workers[0].sizes + workers[1].sizes
    assert workers[0].sizes[0] == workers[1].sizes[0] == 1 and 20 <= max(sizes) <= 25 and sum(sizes) == 200
    assert len(sizes) < 50 and abs(sum(workers[0].sizes) - sum(workers[1].sizes)) <= max(sizes)


@pytest.mark.parametrize("trouble", [Lost(), Gone(), RuntimeError("odd"), UserError("the GPU's memory ran out"), None])
def test_all_chunks_of_a_call_that_goes_wrong_run_again(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception | None
) -> None:
    monkeypatch.setattr(dispatch, "_CALL_S", 5.0)

    class Later(Fake):
        """Its second call goes wrong, or hangs: the first of several chunks."""

        def run(self, request: Any, chunks: Sequence[range]) -> Future[list[RolloutResult]]:
            self.plan = [trouble] if len(self.sizes) == 1 else []
            return super().run(request, chunks)

    later, other = Later("a"), Fake("b", delay_s=0.002)
    patience = Patience(hedge_after=None, timeout_s=5.0 if trouble else 0.1, max_retries=2)
    with contextlib.closing(Dispatcher(Workers(later, other).look, patience)) as dispatcher:
        dispatcher.durations[""].append(0.01)
        job = dispatcher.submit("theta", MANY, str, partial=False)
        assert sorted((result.indices for result in job), key=lambda chunk: chunk.start) == MANY
    size = later.sizes[1]
    assert size > 5 and job.counts["rollouts_rerun"] == 2 * size
    if not isinstance(trouble, Gone):  # which is no fault of a chunk
        assert later.sizes.count(1) + other.sizes.count(1) >= size


def test_jobs_run_side_by_side_the_oldest_first_and_end_in_any_order() -> None:
    slow = Fake("a", delay_s=0.01)
    with contextlib.closing(Dispatcher(Workers(slow, Fake("b", delay_s=0.01)).look, FAST)) as dispatcher:
        first, second = (dispatcher.submit(name, CHUNKS, str, kind=name) for name in ("first", "second"))
        assert sorted(result.indices.start for result in second) == [chunk.start for chunk in CHUNKS]
        assert sorted(result.indices.start for result in first) == [chunk.start for chunk in CHUNKS]
    assert [request for request, _ in slow.calls] == sorted(request for request, _ in slow.calls)


def test_an_error_ends_its_own_job_alone_and_a_cancelled_one_is_handed_out_no_more() -> None:
    class Odd(Fake):
        def run(self, request: Any, chunks: Sequence[range]) -> Future[list[RolloutResult]]:
            self.plan = [UserError("the reward is not finite")] if request == "bad" else []
            return super().run(request, chunks)

    odd = Odd("a", delay_s=0.01)
    with contextlib.closing(Dispatcher(Workers(odd).look, FAST)) as dispatcher:
        bad, dropped, good = (dispatcher.submit(name, CHUNKS, str) for name in ("bad", "dropped", "good"))
        dropped.cancel()
        assert len(list(good)) == len(CHUNKS)
        with pytest.raises(UserError, match="not finite"):
            list(bad)
    assert sum(request == "dropped" for request, _ in odd.calls) <= 1


def test_a_quorum_is_for_jobs_that_can_do_without_the_rest() -> None:
    late = Fake("a", None)
    with contextlib.closing(Dispatcher(Workers(late, Fake("b")).look, Patience(0.5, None))) as dispatcher:
        threading.Timer(0.3, late.release).start()
        assert len(list(dispatcher.submit("all", CHUNKS, str, partial=False))) == len(CHUNKS)


def test_who_waits_runs_what_no_worker_is_free_for() -> None:
    """Also where there is no worker at all, or one that is lost meanwhile; never what a worker would have taken."""
    here: list[range] = []

    def run_here(chunk: range) -> RolloutResult:
        here.append(chunk)
        time.sleep(0.02)
        return _result(chunk)

    for workers, own in (((), 6), ((Fake("a", Lost(), delay_s=0.02),), 2), ((Fake("b", delay_s=0.001),) * 1, 0)):
        here.clear()
        with contextlib.closing(Dispatcher(Workers(*workers).look, FAST)) as dispatcher:
            while len(dispatcher.roster.idle) < len(workers):
                time.sleep(0.01)
            job = dispatcher.submit("theta", CHUNKS, str, here=run_here)
            chunks = sorted((result.indices for result in job), key=lambda chunk: chunk.start)
        assert chunks == CHUNKS and len(here) >= own and job.counts["rollouts_here"] == 2 * len(here)
        assert sum(len(worker.calls) for worker in workers) >= 6 - len(here)


def test_an_error_of_who_waits_is_the_jobs() -> None:
    def broken(chunk: range) -> RolloutResult:
        raise UserError("the reward is not finite")

    with (
        contextlib.closing(Dispatcher(Workers().look, FAST)) as dispatcher,
        pytest.raises(UserError, match="not finite"),
    ):
        list(dispatcher.submit("theta", CHUNKS, str, here=broken))
