"""What the coordinator hands on, and threads that do not die in silence; no Ray, no processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.exceptions import RayActorError

from rlr_ray.cluster import trainer
from rlr_ray.cluster.callbacks import start_worker
from rlr_ray.cluster.coordinator import RunCoordinator, _Forwarder, forwarding, messages_to, repeating
from rlr_ray.cluster.seats import Seat
from rlr_ray.cluster.trainer import _begun, _check_progress, _watched, run_worker
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.errors import UserError
from rlr_ray.train.process import Process
from tests.runs import logged, small_run


class Handle:
    """Calls the object at once, as `ray.get` of what an actor's method returns would."""

    def __init__(self, one: Any):
        self.one = one

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.one, name))


def test_rows_and_messages_of_the_leading_worker_reach_the_driver_in_order(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    coordinator, news, alive = Handle(RunCoordinator()), [], []
    worker = logging.getLogger("rlr_ray.train.loop")
    with messages_to(coordinator, lambda: alive.append(True)):  # type: ignore[arg-type]
        worker.info("training on %d workers", 2)
        coordinator.put.remote({"step": 0})
        worker.warning("could not save")
    worker.warning("after the end")
    with logged() as said, forwarding(coordinator, news.append, str):  # type: ignore[arg-type]
        pass
    assert said == ["training on 2 workers", "could not save"] and news == [{"step": 0}]
    assert len(alive) == 2  # a worker that says what it waits for does not hang


def test_what_the_leading_worker_sent_has_come_when_it_is_done(monkeypatch: Any) -> None:
    """Calls of a process are answered in their order, and none is waited for before."""
    coordinator, sent = RunCoordinator(), list[tuple[str, Any]]()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=lambda *values: sent.append((name, values)))

    monkeypatch.setattr(ray, "get", lambda answer: [getattr(coordinator, name)(*values) for name, values in sent])
    with messages_to(Slow(), lambda: None):  # type: ignore[arg-type]
        logging.getLogger("rlr_ray.train.loop").info("saved")
    assert [text for *_, text in coordinator.take()] == ["saved"]


def test_a_worker_whose_coordinator_is_lost_ends_without_another_error(monkeypatch: Any) -> None:
    """As when the run's folder cannot be made: the driver says so, and Ray Train must not start the worker again."""

    def lost(answer: Any) -> None:
        raise RayActorError

    monkeypatch.setattr(ray, "get", lost)
    with messages_to(Handle(RunCoordinator()), lambda: None):  # type: ignore[arg-type]
        assert not _begun(Handle(RunCoordinator()), lambda: None)


def test_a_report_that_fails_is_logged_and_nothing_else_is_lost(monkeypatch: Any) -> None:
    """Not even of the news that come with it at the end."""
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    coordinator, reported = Handle(RunCoordinator()), []

    def report(row: dict[str, Any]) -> None:
        if row["step"] == 0:
            raise BrokenPipeError("the reader is gone")
        reported.append(row["step"])

    for step in range(3):
        coordinator.put.remote({"step": step})
    with logged() as said, forwarding(coordinator, report, str):  # type: ignore[arg-type]
        pass
    assert reported == [1, 2]
    assert ["BrokenPipeError('the reader is gone')" in text for text in said] == [True]


def test_workers_that_end_again_and_again_without_a_new_update_end_the_run(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    coordinator, cluster = RunCoordinator(), ClusterConfig(max_failures=1)

    def start(size: int, rank: int = 0) -> None:
        _check_progress(cluster, Process(rank, size), Handle(coordinator))

    start(1), start(1)
    coordinator.put({"step": 0})
    start(1)
    start(2), start(2), start(2, rank=1)  # the first is a resize, and one worker speaks for all
    coordinator.put({"step": 0})  # no new one
    coordinator.note_trouble("Traceback of the first")
    coordinator.note_trouble("Traceback of one that it took along")
    with pytest.raises(UserError, match=r"ended 2 times without a new update between; .*:\nTraceback of the first\n"):
        start(2)


def test_after_a_users_error_workers_do_not_start_again(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    coordinator = RunCoordinator()
    for text in ("the reward is not finite", "another worker's"):
        coordinator.fail(UserError(text))
    coordinator.await_workers("training worker 0 ended")
    assert coordinator.take() == [] and str(coordinator.failure()) == "the reward is not finite"
    start_worker({"coordinator": Handle(coordinator), "work": "no worker's"})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_users_error_ends_the_workers_that_wait_for_its_share(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one that raises is ended by Ray Train with the others; one that is alone has nobody that waits."""
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    context = SimpleNamespace(get_world_rank=lambda: size - 1, get_world_size=lambda: size)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.chdir(tmp_path)

    def fails(*arguments: Any) -> None:
        raise UserError("the reward is not finite")

    monkeypatch.setattr("rlr_ray.cluster.trainer._train", fails)
    coordinator, folder = RunCoordinator(), str(tmp_path)
    monkeypatch.setattr(Seat, "take", lambda seat: None)  # which is for a process of its own
    plain = {"config": None, "cluster": ClusterConfig(), "folder": folder, "ran_on": "Ray"}
    with pytest.raises(UserError, match="not finite") if size > 1 else nullcontext():
        run_worker(plain | {"coordinator": Handle(coordinator)})
    assert str(coordinator.failure()) == "the reward is not finite"


def test_that_no_worker_starts_is_told_and_again_when_it_has_doubled(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    coordinator = RunCoordinator()
    forwarder = _Forwarder(Handle(coordinator), print, lambda: "waiting for room")  # type: ignore[arg-type]
    with logged() as said:
        for waited in (59, 61, 119, 121, None, 61):
            coordinator.awaited_since = None if waited is None else time.monotonic() - waited
            forwarder.forward()
    assert said == [f"no training worker has started for {s} s: waiting for room" for s in (61, 121, 61)]


def test_a_worker_that_hangs_ends_the_run_saying_where(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    ended, coordinator = threading.Event(), RunCoordinator()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    with _watched(0.2, Handle(coordinator)) as alive:
        for _ in range(5):
            time.sleep(0.1)
            alive()
        assert not ended.is_set()
        assert ended.wait(10)
    assert str(coordinator.error).startswith("no update came back for 0.2 s (cluster.stall_s); the worker stands at:\n")
    assert "in test_a_worker_that_hangs_ends_the_run_saying_where" in str(coordinator.error)


def test_a_repeating_thread_outlives_its_errors_and_says_each_once() -> None:
    calls, done = [0], threading.Event()

    def act() -> None:
        calls[0] += 1
        if calls[0] > 6:
            done.set()
        if calls[0] <= 4:
            raise ZeroDivisionError("first" if calls[0] < 4 else "second")

    with logged() as said, repeating(act, 0.001, "renewing"):
        assert done.wait(10)
    assert [text.split(": ")[1] for text in said] == ["ZeroDivisionError('first')", "ZeroDivisionError('second')"]
    assert said[0].startswith("renewing failed, and is tried again every 0.001 s")


def test_the_coordinators_process_and_ray_trains_controller_import_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rlr_ray.cluster.coordinator, rlr_ray.cluster.callbacks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_workers_rows_go_to_the_driver_whose_signal_comes_back_and_to_ray_train_with_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent, told, heeded, alive = list[int](), list[dict[str, Any]](), list[Any](), list[None]()

    def put(row: dict[str, Any]) -> str:
        sent.append(row["step"])
        return f"answer {row['step']}"

    there = SimpleNamespace(get=lambda answer: answer, train=SimpleNamespace(report=told.append))
    monkeypatch.setattr(trainer, "ray", there)
    monkeypatch.setattr(trainer, "ask", heeded.append)
    coordinator = SimpleNamespace(put=SimpleNamespace(remote=put))
    config = small_run(tmp_path, train={"checkpoint_every": 2})
    report = trainer._reporting(config, coordinator, Process(), None, lambda: alive.append(None))
    for step in range(4):
        report({"step": step, "reward_mean": 0.5, "plan": "words"})
    assert sent == [0, 1, 2, 3] and len(alive) == 4 and heeded == ["answer 0", "answer 1", "answer 2"]
    assert told == [{"step": 1, "reward_mean": 0.5}, {"step": 3, "reward_mean": 0.5}]
