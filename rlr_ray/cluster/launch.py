"""Start a run on Ray: a TorchTrainer for backpropagation, a pool of actors for the rollouts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlr_ray.cluster.actor_pool import Fleet, growing
from rlr_ray.cluster.coordinator import Mailbox, beside, forwarding
from rlr_ray.cluster.jobs import Patience
from rlr_ray.cluster.resources import Room, check_reachable, enter, room
from rlr_ray.cluster.reward_actors import rewards_apart
from rlr_ray.cluster.rollouts import RolloutPool
from rlr_ray.cluster.trainer import fit, missing_words
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.train.engine import Built

if TYPE_CHECKING:
    from rlr_ray.lab.planner import Choice
    from rlr_ray.loggers import Report

logger = logging.getLogger(__name__)


def run_on_ray(
    config: RunConfig,
    cluster: ClusterConfig,
    report: Report,
    begin: Callable[[], None],
) -> None:
    """Train on Ray. Raises UserError for what a user can mend, wherever it happened.

    `begin` makes the run's folder, once there is room and the first actors have built their engines. The workers start
    and build theirs meanwhile.
    """
    actors = cluster.rollouts.min_actors if config.plan_shape.has_zeroth_order else 0
    with (
        connected(cluster) as local,
        room(cluster, actors, local=local, apart=config.apart) as held,
        rewards_apart(config, held) as built,
        _mailbox() as mailbox,
        _fleet(config, cluster, actors, held, built, mailbox) as fleet,
        forwarding(mailbox, report, lambda: missing_words(cluster)),
    ):
        held.release_workers()
        rollouts = None if fleet is None else _pool(config, cluster, mailbox)
        training = beside(lambda: fit(config, cluster, rollouts, built, mailbox))
        if fleet is not None:
            fleet.await_ready()
        if not training.done():  # else it failed, and an earlier run of this name stays as it was
            begin()
            mailbox.begin.remote()
        training.result()


def choose_on_ray(config: RunConfig, cluster: ClusterConfig, batches: int | None) -> Choice:
    """Choose a plan by measurement on a worker's device. Raises UserError as `choose` does."""
    with connected(cluster) as local:
        logger.info("measuring plans on a worker's device")
        choice: Choice = on_worker(config, cluster, _choose, batches, local=local)
    return choice


def _choose(config: RunConfig, built: Built, batches: int | None) -> Choice:
    from rlr_ray.lab.planner import choose  # only here: the laboratory takes seconds to import

    return choose(config, batches, built)


def on_worker(
    config: RunConfig,
    cluster: ClusterConfig,
    function: Callable[..., Any],
    *arguments: Any,
    local: bool,
) -> Any:
    """What `function(config, built, *arguments)` returns in a worker's place, with the rewards that have actors.

    Raises what it raised, and UserError if there is no room.
    """
    gpus, cpus, apart = cluster.worker.gpus, cluster.worker.cpus, config.apart
    with (
        room(cluster, 0, local=local, apart=apart) as held,
        rewards_apart(config, held) as built,
    ):
        placed = PlacementGroupSchedulingStrategy(held.workers) if held.workers else "DEFAULT"
        task = ray.remote(max_calls=1)(_entered).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=placed)
        try:
            return ray.get(task.remote(os.getcwd(), function, config.on(gpus), built, *arguments))
        except RayTaskError as error:
            raise error.cause from None


def _entered(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    enter(folder)
    return function(*arguments)


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
def connected(cluster: ClusterConfig) -> Iterator[bool]:
    """Connect to the Ray that is named or runs here, else start one for this run; True if it cannot grow."""
    if ray.is_initialized():  # a test's, or a caller's own
        yield True
        return
    check_reachable(cluster.address or os.environ.get("RAY_ADDRESS", ""))
    logger.info("connecting to Ray")
    context = ray.init(  # without an address: the Ray that `ray start` left running here, else a new one
        address=cluster.address,
        include_dashboard=None if cluster.address else False,
        logging_level="warning",
        log_to_driver=False,
    )
    alone = context.address_info["session_dir"].endswith(f"_{os.getpid()}")  # Ray names a session by who started it
    if alone:  # nobody will take this machine away from its only run: one process less
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        yield alone
    finally:
        ray.shutdown()


@contextmanager
def _fleet(
    config: RunConfig,
    cluster: ClusterConfig,
    actors: int,
    held: Room,
    built: Built,
    mailbox: ActorHandle,
) -> Iterator[Fleet | None]:
    """Actors that start, grow and shrink, and end with the block; None if the plan has no zeroth order."""
    if not actors:
        yield None
        return
    logger.info(f"starting {actors} rollout actor{'s' * (actors > 1)}")
    fleet = Fleet(config, cluster, held, mailbox, os.getcwd(), built)
    try:
        fleet.start()
        with growing(fleet, mailbox):
            yield fleet
    finally:
        fleet.end()


def _pool(config: RunConfig, cluster: ClusterConfig, mailbox: ActorHandle) -> RolloutPool:
    """The rollouts of whoever is in the crew that the mailbox tells of."""
    asked = cluster.rollouts
    patience = Patience(asked.quorum, asked.hedge_after, asked.timeout_s, asked.max_retries)
    return RolloutPool(mailbox, patience, config.seed)
