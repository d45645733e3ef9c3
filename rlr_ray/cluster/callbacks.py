"""What Ray Train's controller tells the run's coordinator. Imports nothing heavy: it is a process of its own."""

from __future__ import annotations

from typing import Any

import ray.train
from ray.actor import ActorHandle

from rlr_ray.errors import first_line


class Restarts(ray.train.UserCallback):
    """Notes that workers ended, and so start again."""

    def __init__(self, coordinator: ActorHandle):
        self.coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items())
        why = first_line(error)[:200]
        text = f"training worker {rank} ended ({why}); the workers start again from the last checkpoint"
        self.coordinator.await_workers.remote(text)
