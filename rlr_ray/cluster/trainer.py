"""The TorchTrainer of a run: its workers, what becomes of them, and what they wait for."""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch.distributed
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from rlr_ray.cluster.callbacks import Restarts, start_worker
from rlr_ray.cluster.coordinator import messages_to
from rlr_ray.cluster.resources import enter, listed
from rlr_ray.cluster.rollouts import RolloutPool
from rlr_ray.cluster.seats import Seat
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine, RemoteRewards
from rlr_ray.utils.environment import prepare_process
from rlr_ray.utils.signals import ask

if TYPE_CHECKING:
    from rlr_ray.models.sharding import Shards
    from rlr_ray.train.process import Process

logger = logging.getLogger(__name__)
_RESIZE_EVERY_S = 15.0  # that elastic workers look for more room
_PATIENCE_S = 24 * 3600  # of workers for the leading one while it evaluates; a dead worker is noticed by Ray Train


def missing_words(cluster: ClusterConfig) -> str:
    """What workers that do not start may wait for."""
    workers, free = cluster.worker_range.min, ray.available_resources()
    there = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in cluster.worker.demand)
    return f"waiting for room for {workers} of {listed(cluster.worker.demand)}; the cluster has {there} free"


def fit(
    config: RunConfig,
    cluster: ClusterConfig,
    rollouts: RolloutPool | None,
    remote: RemoteRewards,
    coordinator: ActorHandle,
) -> None:
    """Train, from the moment when the workers have room. Raises UserError if the run failed."""
    with TemporaryDirectory(prefix="rlr-ray-") as folder:  # of Ray Train: what a run keeps is in its own folder
        trainer = _trainer(config, cluster, rollouts, remote, coordinator, folder)
        coordinator.await_workers.remote()
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _failure(coordinator) or UserError(
                f"Ray Train ended the run: {error}; --resume goes on from the last checkpoint"
            ) from error
    failure = _failure(coordinator)
    if failure:
        raise failure


def _trainer(
    config: RunConfig,
    cluster: ClusterConfig,
    rollouts: RolloutPool | None,
    remote: RemoteRewards,
    coordinator: ActorHandle,
    folder: str,
) -> TorchTrainer:
    workers = cluster.worker_range
    number = f"{workers.min} to {workers.max}" if workers.min < workers.max else f"{workers.min}"
    actors = f" and {cluster.rollouts.min_actors} to {cluster.rollouts.max_actors} rollout actors" if rollouts else ""
    logger.info(f"starting a TorchTrainer of {number} worker{'s' * (workers.max > 1)}")
    role = config.on(cluster.worker.gpus)
    work = {
        "config": role,
        "cluster": cluster,
        "folder": os.getcwd(),
        "rollouts": rollouts,
        "remote": remote,
        "coordinator": coordinator,
        "ran_on": f"Ray {ray.__version__}: a TorchTrainer of {number} worker(s){actors}",
    }
    return TorchTrainer(
        start_worker,
        train_loop_config={"work": ray.put(work), "coordinator": coordinator},
        torch_config=TorchConfig(backend="gloo" if role.device == "cpu" else "nccl", timeout_s=_PATIENCE_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.min < workers.max else workers.min,
            use_gpu=cluster.worker.gpus > 0,
            resources_per_worker=cluster.worker.demand,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=-1),  # the workers count: see _check_progress
            callbacks=[Restarts(coordinator)],
        ),
    )


def _failure(coordinator: ActorHandle) -> Exception | None:
    try:
        failure: Exception | None = ray.get(coordinator.failure.remote())
    except RayActorError:
        return UserError(
            "the run's coordinator, a process on the driver's node, was lost; --resume goes on from the last checkpoint"
        )
    return failure


_LOOK_S = 0.1  # between two looks whether the run has begun


def run_worker(loop_config: dict[str, Any]) -> None:
    """Train with the other workers. A user's error ends the run instead of being retried."""
    from rlr_ray.train.process import Process  # only here, as below: the driver needs none of it

    coordinator, context = loop_config["coordinator"], ray.train.get_context()
    shards = _shards(loop_config["config"], loop_config["cluster"], context.get_world_size())
    reduce = functools.partial(_all_reduce, shards)
    process = Process(context.get_world_rank(), context.get_world_size(), reduce, loop_config["ran_on"])
    try:
        name = ray.get(coordinator.called.remote())
        if crash := Seat(name, f"{name}-{process.rank}").take():
            raise crash
        _check_progress(loop_config["cluster"], process, coordinator)
        enter(loop_config["folder"])
        _train(loop_config, process, shards)
    except UserError as error:
        ray.get(coordinator.fail.remote(error))
        if process.size > 1:
            raise  # the others wait for this worker's share: Ray Train ends them
    except Exception:
        ray.get(coordinator.note_trouble.remote(traceback.format_exc()))
        raise


def _check_progress(cluster: ClusterConfig, process: Process, coordinator: Any) -> None:
    """Raise UserError if the workers started too often without a new update; nodes may come and go for days."""
    if not process.leads:
        return
    starts, trouble = ray.get(coordinator.start.remote(process.size))
    if starts > cluster.max_failures + 1:
        last = f"the last error was:\n{trouble}" if trouble else "they left no error: killed, or their node was lost"
        raise UserError(
            f"the training workers ended {starts - 1} times without a new update between; {last}\n"
            "if memory ran out, lower train.chunk_size; raise cluster.max_failures to go on trying; --resume goes on "
            "from the last checkpoint"
        )


def _shards(config: RunConfig, cluster: ClusterConfig, workers: int) -> Shards | None:
    """Among which the workers' denoiser is cut, if it is."""
    from rlr_ray.models.sharding import Shards
    from rlr_ray.train.picture_engine import pick_device

    return Shards(pick_device(config.device)) if cluster.worker.shard and workers > 1 else None


def _train(loop_config: dict[str, Any], process: Process, shards: Shards | None) -> None:
    from rlr_ray.train.agreement import check_agreement
    from rlr_ray.train.loop import train

    config: RunConfig = loop_config["config"]
    coordinator, rollouts = loop_config["coordinator"], loop_config["rollouts"]
    # Only the leading worker: the others wait for it while it waits for rollout actors, which is no hang.
    with (
        _watched(loop_config["cluster"].stall_s if process.leads else math.inf, coordinator) as alive,
        messages_to(coordinator, alive) if process.leads else nullcontext(),
    ):
        try:
            prepare_process(config.threads)
            engine = Engine(config, loop_config["remote"], shards)
            if rollouts is not None:
                alike = config.actors_sample and not config.actors_differ
                rollouts.share(process.size, engine.run if alike else None)
            if process.leads:
                coordinator.note_built.remote()
            if not _begun(coordinator, alive):
                return
            if rollouts is not None and config.actors_differ and process.leads:
                check_agreement(engine, rollouts, loop_config["cluster"].rollouts)
            if process.leads:
                logger.info(f"training on {process.size} worker{'s' * (process.size > 1)}")
            train(engine, rollouts, _reporting(config, coordinator, process, shards, alive), process)
            if shards is not None:
                shards.wait()  # for the leading worker, which measures what came of the run
        finally:
            if rollouts is not None:
                rollouts.close()


def _reporting(
    config: RunConfig, coordinator: Any, process: Process, shards: Shards | None, alive: Callable[[], None]
) -> Callable[[dict[str, Any]], None]:
    """Takes every update's row to the driver, whose signals it heeds, and to Ray Train."""
    put: ray.ObjectRef | None = None

    def report(row: dict[str, Any]) -> None:
        nonlocal put
        alive()
        if shards is not None:
            shards.wait()  # Ray's report waits for all workers, and one may still be evaluating
        if process.leads:
            if put is not None:
                ask(ray.get(put))  # of the update before: nothing waits for the answer
            put = coordinator.put.remote(row)
        if (row["step"] + 1) % config.train.checkpoint_every == 0:  # a report costs about 0.1 s: not every update
            ray.train.report({name: value for name, value in row.items() if isinstance(value, int | float)})

    return report


def _begun(coordinator: Any, alive: Callable[[], None]) -> bool:
    """Wait until the driver has made the run's folder; False if it gave up."""
    try:
        while not ray.get(coordinator.has_begun.remote()):
            alive()  # waiting for actors is no hang
            time.sleep(_LOOK_S)
    except RayActorError:
        return False
    return True


@contextmanager
def _watched(stall_s: float, coordinator: Any) -> Iterator[Callable[[], None]]:
    """End this process, and the run, if what it yields is not called for too long: something hangs."""
    watched, seen, ended = threading.get_ident(), time.monotonic(), threading.Event()

    def alive() -> None:
        nonlocal seen
        seen = time.monotonic()

    def watch() -> None:
        while not ended.wait(min(stall_s / 10, 1.0)):
            if time.monotonic() - seen > stall_s:
                try:
                    where = "".join(traceback.format_stack(sys._current_frames()[watched]))
                    ray.get(coordinator.fail.remote(UserError(_stalled(stall_s, where))))
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


def _all_reduce(shards: Shards | None, value: Tensor) -> Tensor:
    """Sum over the workers, of whom those that are not there yet may need the others' blocks."""
    if shards is not None:
        shards.wait()
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
