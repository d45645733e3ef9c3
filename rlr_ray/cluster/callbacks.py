"""What Ray Train's controller holds of a run. Imports nothing heavy: it is a process of its own."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

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


def start_worker(loop_config: dict[str, Any]) -> None:
    """Do a worker's part, by the reference in `work`: the controller need not unpack it, which takes seconds."""
    try:
        if ray.get(loop_config["coordinator"].failure.remote()):  # restarted after a user's error
            return
    except RayActorError:  # the coordinator is lost: the driver says so, once this ends
        return
    from rlr_ray.cluster.trainer import run_worker  # only here: it takes torch and all that an engine needs

    run_worker(ray.get(loop_config["work"]))
