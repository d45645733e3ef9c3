"""Start a run on Ray: a TorchTrainer for backpropagation, a pool of actors for the rollouts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Before ray is imported: how soon a report returns, and no message per worker on the driver's screen.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.train
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlr_ray.cluster.folder import enter
from rlr_ray.cluster.mailbox import Mailbox
from rlr_ray.cluster.preflight import Room, check_reachable, room
from rlr_ray.cluster.rollouts import RolloutPool, start_actors
from rlr_ray.cluster.worker import run_worker
from rlr_ray.config import ClusterConfig, RunConfig
from rlr_ray.errors import UserError
from rlr_ray.lab.planner import Choice, choose
from rlr_ray.loop import Report

_PATIENCE_S = 24 * 3600  # of workers for the leading one while it evaluates; a dead worker is noticed by Ray Train


def run_on_ray(
    config: RunConfig,
    cluster: ClusterConfig,
    report: Report,
    say: Callable[[str], None],
    begin: Callable[[], None],
) -> None:
    """Train on Ray. Raises UserError for what a user can mend, wherever it happened.

    `begin` makes the run's folder, once there is room and the actors have built their engines.
    """
    actors = cluster.rollouts.max_actors if config.plan_shape.has_zeroth_order else 0
    with (
        _connected(cluster, say) as local,
        room(cluster, actors, say, local=local) as held,
        _rollouts(config, cluster, actors, held, say) as rollouts,
    ):
        begin()
        workers = cluster.worker_range.max
        say(f"starting a TorchTrainer with {workers} worker{'s' * (workers > 1)}")
        held.release_workers()
        with _mailbox() as mailbox, _forwarding(mailbox, report, say):
            _fit(config, cluster, rollouts, mailbox)


def choose_on_ray(config: RunConfig, cluster: ClusterConfig, batches: int | None, say: Callable[[str], None]) -> Choice:
    """Choose a plan by measurement on a worker's device. Raises UserError as `choose` does."""
    with _connected(cluster, say) as local, room(cluster, 0, say, local=local) as held:
        say("measuring plans on a worker's device")
        placed = PlacementGroupSchedulingStrategy(held.workers)
        gpus, cpus = cluster.worker.gpus, cluster.worker.cpus
        task = ray.remote(_choose).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=placed)
        try:
            choice: Choice = ray.get(task.remote(config.on(gpus), batches, os.getcwd()))
        except RayTaskError as error:
            raise error.cause from None
    return choice


def _choose(config: RunConfig, batches: int | None, folder: str) -> Choice:
    enter(folder)
    return choose(config, lambda text: None, batches)


@contextmanager
def _mailbox() -> Iterator[ActorHandle]:
    """On the driver's node, so that it lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    try:
        yield mailbox
    finally:
        ray.kill(mailbox)


@contextmanager
def _connected(cluster: ClusterConfig, say: Callable[[str], None]) -> Iterator[bool]:
    """Connect to the Ray that is named or runs here, else start one for this run; True if it cannot grow."""
    if ray.is_initialized():  # a test's, or a caller's own
        yield True
        return
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "TRANSFORMERS_VERBOSITY": "error"}
    check_reachable(cluster.address or os.environ.get("RAY_ADDRESS", ""))
    say("connecting to Ray")
    context = ray.init(  # without an address: the Ray that `ray start` left running here, else a new one
        address=cluster.address,
        include_dashboard=None if cluster.address else False,
        logging_level="warning",
        log_to_driver=False,
        runtime_env={"env_vars": quiet},
    )
    try:
        yield context.address_info["session_dir"].endswith(f"_{os.getpid()}")  # Ray names a session by who started it
    finally:
        ray.shutdown()


@contextmanager
def _rollouts(
    config: RunConfig, cluster: ClusterConfig, actors: int, held: Room, say: Callable[[str], None]
) -> Iterator[RolloutPool | None]:
    """A pool of actors that ends with the block; None if the plan has no zeroth order."""
    if not actors:
        yield None
        return
    say(f"starting {actors} rollout actors")
    handles = start_actors(config.on(cluster.rollouts.gpus), cluster, held.actors, os.getcwd())
    try:
        yield RolloutPool(handles, cluster.rollouts.max_retries)
    finally:
        for handle in handles:
            ray.kill(handle)


@contextmanager
def _forwarding(mailbox: ActorHandle, report: Report, say: Callable[[str], None]) -> Iterator[None]:
    """Hand the leading worker's rows to `report`, its texts to `say`, in this process until the block ends."""
    ended = threading.Event()

    def forward() -> None:
        while True:
            last = ended.wait(0.5)
            for text in ray.get(mailbox.take_texts.remote()):
                say(text)
            for row in ray.get(mailbox.take.remote()):
                report(row)
            if last:
                return

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _fit(config: RunConfig, cluster: ClusterConfig, rollouts: RolloutPool | None, mailbox: Any) -> None:
    actors = f" and {cluster.rollouts.max_actors} rollout actors" if rollouts else ""
    ran_on = f"Ray {ray.__version__}: a TorchTrainer of {cluster.worker_range.max} worker(s){actors}"
    role = config.on(cluster.worker.gpus)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "config": role,
            "folder": os.getcwd(),
            "rollouts": rollouts,
            "mailbox": mailbox,
            "ran_on": ran_on,
        },
        torch_config=TorchConfig(backend="gloo" if role.device == "cpu" else "nccl", timeout_s=_PATIENCE_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.worker_range.max,
            use_gpu=cluster.worker.gpus > 0,
            resources_per_worker=cluster.worker.demand,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=str(config.folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        failure = ray.get(mailbox.failure.remote())
        if failure:
            raise UserError(failure)
