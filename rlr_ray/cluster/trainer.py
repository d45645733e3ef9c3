"""The TorchTrainer of a run: its workers, what becomes of them, and what they wait for."""

from __future__ import annotations

import os
from collections.abc import Callable
from tempfile import TemporaryDirectory

import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer

from rlr_ray.cluster.placement import listed
from rlr_ray.cluster.restarts import Restarts
from rlr_ray.cluster.rollouts import RolloutPool
from rlr_ray.cluster.worker import run_worker
from rlr_ray.cluster_config import ClusterConfig
from rlr_ray.config import RunConfig
from rlr_ray.engine import Built
from rlr_ray.errors import UserError

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
    built: Built,
    mailbox: ActorHandle,
    say: Callable[[str], None],
) -> None:
    """Train, from the moment when the workers have room. Raises UserError if the run failed."""
    with TemporaryDirectory(prefix="rlr-ray-") as folder:  # of Ray Train: what a run keeps is in its own folder
        trainer = _trainer(config, cluster, rollouts, built, mailbox, say, folder)
        mailbox.await_workers.remote()
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _failure(mailbox) or UserError(
                f"Ray Train ended the run: {error}; --resume goes on from the last checkpoint"
            ) from error
    failure = _failure(mailbox)
    if failure:
        raise failure


def _trainer(
    config: RunConfig,
    cluster: ClusterConfig,
    rollouts: RolloutPool | None,
    built: Built,
    mailbox: ActorHandle,
    say: Callable[[str], None],
    folder: str,
) -> TorchTrainer:
    workers = cluster.worker_range
    number = f"{workers.min} to {workers.max}" if workers.min < workers.max else f"{workers.min}"
    actors = f" and {cluster.rollouts.min_actors} to {cluster.rollouts.max_actors} rollout actors" if rollouts else ""
    say(f"starting a TorchTrainer of {number} worker{'s' * (workers.max > 1)}")
    role = config.on(cluster.worker.gpus)
    return TorchTrainer(
        run_worker,
        train_loop_config={
            "config": role,
            "cluster": cluster,
            "folder": os.getcwd(),
            "rollouts": rollouts,
            "built": built,
            "mailbox": mailbox,
            "ran_on": f"Ray {ray.__version__}: a TorchTrainer of {number} worker(s){actors}",
        },
        torch_config=TorchConfig(backend="gloo" if role.device == "cpu" else "nccl", timeout_s=_PATIENCE_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.min < workers.max else workers.min,
            use_gpu=cluster.worker.gpus > 0,
            resources_per_worker=cluster.worker.demand,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=-1),  # the workers count themselves: see worker.py
            callbacks=[Restarts(mailbox)],
        ),
    )


def _failure(mailbox: ActorHandle) -> Exception | None:
    try:
        failure: Exception | None = ray.get(mailbox.failure.remote())
    except RayActorError:
        return UserError(
            "the run's mailbox, a process on the driver's node, was lost; --resume goes on from the last checkpoint"
        )
    return failure
