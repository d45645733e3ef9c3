"""What the coordinator hands on, and threads that do not die in silence; no Ray, no processes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import ray

from rlr_ray.cluster.coordinator import RunCoordinator, forwarding, messages_to
from tests.runs import logged


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
