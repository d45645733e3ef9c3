"""Start a run on Ray: a TorchTrainer for backpropagation, a pool of actors for what needs no gradient."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlr_ray.cluster.actor_pool import ActorPool
from rlr_ray.cluster.coordinator import RunCoordinator, beside, forwarding
from rlr_ray.cluster.jobs import Patience
from rlr_ray.cluster.resources import enter_and_call, hold_resources
from rlr_ray.cluster.reward_actors import remote_rewards
from rlr_ray.cluster.rollouts import RolloutPool
from rlr_ray.cluster.trainer import fit, missing_words
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError, first_line
from rlr_ray.train.engine import RemoteRewards
from rlr_ray.utils.signals import after_update, heed

if TYPE_CHECKING:
    from rlr_ray.lab.options import Choice
    from rlr_ray.loggers import Report

logger = logging.getLogger(__name__)
_LOOK_S = 0.1  # between two looks whether the leading worker is ready
_ANSWER_S = 5.0  # for a Ray that runs to accept a connection


def run_on_ray(config: RunConfig, cluster: ClusterConfig, report: Report, begin: Callable[[], None]) -> None:
    """Train on Ray. Raises UserError for what a user can mend, wherever it happened.

    `begin` makes the run's folder, once there is room, and the first actors and the leading worker have built their
    engines.
    """
    actors = cluster.rollouts.min_actors if config.needs_actors else 0
    with (
        connected(cluster) as local,
        hold_resources(cluster, actors, local=local, remote=config.remote_rewards) as room,
        _coordinator() as coordinator,
        remote_rewards(config, room, coordinator) as remote,
        ActorPool(config, cluster, room, coordinator, remote).running()
        if config.needs_actors
        else nullcontext() as pool,
        forwarding(coordinator, report, lambda: missing_words(cluster)),
    ):
        room.release_workers()
        patience = Patience(cluster.rollouts.quorum, cluster.rollouts.hedge_after, cluster.rollouts.timeout_s)
        rollouts = RolloutPool(coordinator, patience, config.seed) if pool else None
        training = beside(lambda: fit(config, cluster, rollouts, remote, coordinator))
        if pool:
            pool.await_ready()
        if _await_built(coordinator, training):  # else it failed, and an earlier run of this name stays as it was
            begin()
            coordinator.begin.remote()
        with after_update():
            training.result()


def _await_built(coordinator: ActorHandle, training: Future[None]) -> bool:
    """Wait until the leading worker has its engine; False if the run ended before."""
    try:
        while not training.done():
            if ray.get(coordinator.is_built.remote()):
                return True
            time.sleep(_LOOK_S)
    except RayActorError:  # it is lost, so the training ends, and says why
        pass
    return False


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[bool]:
    """Connect to the Ray that is named or runs here, else start one for this run; True if it cannot grow."""
    if ray.is_initialized():  # a test's, or a caller's own
        yield True
        return
    check_reachable(cluster.address or os.environ.get("RAY_ADDRESS", ""))
    logger.info("connecting to Ray")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it tells what the user has set
    before = psutil.Process().children()
    try:
        ray.init(  # without an address: the Ray that `ray start` left running here, else a new one
            address=cluster.address,
            include_dashboard=None if cluster.address else False,
            logging_level="warning",
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise UserError(f"no Ray is there to connect to ({first_line(error)}); {_START_ONE}") from error
    heed()  # Ray has put handlers of its own
    alone = len(psutil.Process().children()) > len(before)  # a Ray that is started here is this process's child
    if alone:  # nobody will take this machine away from its only run: one process less
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        yield alone
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at a `host:port`; Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise UserError(
            f"the address {address} is one for Ray's client, which cannot run a trainer; run on the cluster itself: "
            "`ray submit cluster.yaml train.py -- --config ...`"
        )
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(
            f"the address {address!r} of Ray (cluster.address or RAY_ADDRESS) has no port; allowed: host:port, auto, "
            f"local; write {address.rstrip(':') or 'host'}:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(f"no Ray answers at {address} ({error}); {_START_ONE}") from error


_START_ONE = (
    "set cluster.address or RAY_ADDRESS to one that runs, or leave both out (unset RAY_ADDRESS) to start one on this "
    "machine"
)


@contextmanager
def _coordinator() -> Iterator[ActorHandle]:
    """On the driver's node, so that it lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"coordinator-{uuid4().hex}"
    coordinator = ray.remote(RunCoordinator).options(name=name, num_cpus=0, scheduling_strategy=here).remote(name)
    try:
        yield coordinator
    finally:
        ray.kill(coordinator)


def choose_on_ray(config: RunConfig, cluster: ClusterConfig, batches: int | None) -> Choice:
    """Choose a plan by measurement on a worker's device. Raises UserError as `choose` does."""
    with connected(cluster) as local:
        logger.info("measuring plans on a worker's device")
        choice: Choice = on_worker(config, cluster, _choose, batches, local=local)
    return choice


def _choose(config: RunConfig, remote: RemoteRewards, batches: int | None) -> Choice:
    from rlr_ray.lab.planner import choose  # only here: the laboratory takes seconds to import

    return choose(config, batches, remote)


def on_worker(
    config: RunConfig, cluster: ClusterConfig, function: Callable[..., Any], *arguments: Any, local: bool
) -> Any:
    """What `function(config, remote, *arguments)` returns in a worker's place, with the rewards that have actors.

    Raises what it raised, and UserError if there is no room.
    """
    with (
        hold_resources(cluster, 0, local=local, remote=config.remote_rewards) as room,
        remote_rewards(config, room) as remote,
    ):
        place = PlacementGroupSchedulingStrategy(room.workers) if room.workers else "DEFAULT"
        return call_in_task(cluster.worker.cpus, cluster.worker.gpus, place, function, config, remote, *arguments)


def call_in_task(
    cpus: float,
    gpus: float,
    place: Any,
    function: Callable[..., Any],
    config: RunConfig,
    remote: RemoteRewards,
    *arguments: Any,
) -> Any:
    """What `function(config, remote, *arguments)` returns in a process of its own.

    Raises what it raised, and UserError if the process was lost.
    """
    task = ray.remote(max_calls=1)(enter_and_call).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=place)
    try:
        return ray.get(task.remote(os.getcwd(), function, config.on(gpus), remote, *arguments))
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise UserError(
            f"the process that measures was lost ({first_line(error)}); if memory ran out there, lower "
            "train.chunk_size or estimator.zeroth_order.chunk_size"
        ) from error
