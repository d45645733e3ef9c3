"""What every TorchTrainer worker runs."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch.distributed
from ray.exceptions import RayActorError
from torch import Tensor

from rlr_ray.cluster.folder import enter
from rlr_ray.cluster_config import ClusterConfig
from rlr_ray.config import RunConfig
from rlr_ray.engine import Engine
from rlr_ray.errors import UserError

if TYPE_CHECKING:
    from rlr_ray.loop import Process

_LOOK_S = 0.1  # between two looks whether the run has begun


def run_worker(loop_config: dict[str, Any]) -> None:
    """Train with the other workers. A user's error ends the run instead of being retried."""
    from rlr_ray.loop import Process  # only here, as below: the driver, which sends this function, needs none of it

    mailbox, context = loop_config["mailbox"], ray.train.get_context()
    try:
        if ray.get(mailbox.failure.remote()):  # restarted after a user's error
            return
    except RayActorError:  # the mailbox is lost: the driver says so, once this ends
        return
    process = Process(context.get_world_rank(), context.get_world_size(), _all_reduce, loop_config["ran_on"])
    try:
        _check_progress(loop_config["cluster"], process, mailbox)
        enter(loop_config["folder"])
        _train(loop_config, process)
    except UserError as error:
        ray.get(mailbox.fail.remote(error))
        if process.size > 1:
            raise  # the others wait for this worker's share: Ray Train ends them
    except Exception:
        ray.get(mailbox.note_trouble.remote(traceback.format_exc()))
        raise


def _check_progress(cluster: ClusterConfig, process: Process, mailbox: Any) -> None:
    """Raise UserError if the workers started too often without a new update; nodes may come and go for days."""
    if not process.leads:
        return
    starts, trouble = ray.get(mailbox.start.remote(process.size))
    if starts > cluster.max_failures + 1:
        last = f"the last error was:\n{trouble}" if trouble else "they left no error: killed, or their node was lost"
        raise UserError(
            f"the training workers ended {starts - 1} times without a new update between; {last}\n"
            "if memory ran out, lower train.chunk_size; raise cluster.max_failures to go on trying; --resume goes on "
            "from the last checkpoint"
        )


def _train(loop_config: dict[str, Any], process: Process) -> None:
    from rlr_ray.loop import train

    config: RunConfig = loop_config["config"]
    mailbox, rollouts = loop_config["mailbox"], loop_config["rollouts"]
    # Only the leading worker: the others wait for it while it waits for rollout actors, which is no hang.
    with _watched(loop_config["cluster"].stall_s if process.leads else math.inf, mailbox) as alive:

        def report(row: dict[str, Any]) -> None:
            alive()
            if process.leads:
                mailbox.put.remote(row)
            if (row["step"] + 1) % config.train.checkpoint_every == 0:  # a report costs about 0.1 s: not every update
                ray.train.report({name: value for name, value in row.items() if isinstance(value, int | float)})

        def say(text: str) -> None:
            alive()  # waiting for actors is no hang
            mailbox.put.remote(text)

        if rollouts is not None:
            rollouts.on_news = say
        try:
            engine = Engine(config, loop_config["built"])
            if not _begun(mailbox, alive):
                return
            if process.leads:
                say(f"training on {process.size} worker{'s' * (process.size > 1)}")
            train(engine, rollouts, report, process, say)
        finally:
            if rollouts is not None:
                rollouts.close()


def _begun(mailbox: Any, alive: Callable[[], None]) -> bool:
    """Wait until the driver has made the run's folder; False if it gave up."""
    try:
        while not ray.get(mailbox.has_begun.remote()):
            alive()  # waiting for actors is no hang
            time.sleep(_LOOK_S)
    except RayActorError:
        return False
    return True


@contextmanager
def _watched(stall_s: float, mailbox: Any) -> Iterator[Callable[[], None]]:
    """End this process, and the run, if what it yields is not called for too long: something hangs."""
    watched, seen, ended = threading.get_ident(), time.monotonic(), threading.Event()

    def alive() -> None:
        nonlocal seen
        seen = time.monotonic()

    def watch() -> None:
        while not ended.wait(min(stall_s / 10, 1.0)):
            if time.monotonic() - seen > stall_s:
                where = "".join(traceback.format_stack(sys._current_frames()[watched]))
                try:
                    ray.get(mailbox.fail.remote(UserError(_stalled(stall_s, where))))
                finally:
                    os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield alive
    finally:
        ended.set()


def _stalled(stall_s: float, where: str) -> str:
    return (
        f"no update came back for {stall_s:g} s (cluster.stall_s); the worker stands at:\n{where}"
        "see what it waits for, e.g. a server behind the reward, or raise cluster.stall_s; --resume goes on from the "
        "last checkpoint"
    )


def _all_reduce(value: Tensor) -> Tensor:
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
