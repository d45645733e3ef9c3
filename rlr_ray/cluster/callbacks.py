"""What Ray Train's controller tells the driver. Imports nothing heavy: the controller is a process of its own."""

from __future__ import annotations

from typing import Any

import ray.train
from ray.actor import ActorHandle

from rlr_ray.errors import first_line


class Restarts(ray.train.UserCallback):
    """Tells the driver that workers ended, and so start again."""

    def __init__(self, mailbox: ActorHandle):
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items())
        why = first_line(error)[:200]
        text = f"training worker {rank} ended ({why}); the workers start again from the last checkpoint"
        self.mailbox.await_workers.remote(text)
