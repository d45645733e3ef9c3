"""Room on the cluster for a run: whether it can be had, before anything waits for it, and holding it."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import platform
import random
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlr_ray.cluster.coordinator import repeating
from rlr_ray.config.cluster import ClusterConfig, Resources
from rlr_ray.config.rewards import Judges
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.utils.environment import prepare_process

logger = logging.getLogger(__name__)
_HALF_S = 5.0  # that a run keeps half of its room while it waits for others to free the other half
_GROWING_S = 120.0  # the same while it waits for new nodes
_RENEW_S = 10.0  # between two words to Ray's coordinator that the room is still needed


@dataclass(frozen=True)
class HeldResources:
    """Resources that are held for the run: a bundle for each worker, first rollout actor and actor of a reward."""

    workers: PlacementGroup | None  # None if they need nothing
    actors: PlacementGroup | None  # likewise
    rewards: Sequence[PlacementGroup | None]  # likewise, of each reward that has actors
    reserved: Sequence[Reservation]  # the same, known to Ray's coordinator: other runs' extra actors make way

    def renew(self) -> None:
        """All but the workers' share."""
        for reservation in self.reserved[1:]:
            reservation.renew()

    def release_workers(self) -> None:
        """Give the workers' share to the TorchTrainer, which makes a placement group and a reservation of its own."""
        if self.workers:
            remove_placement_group(self.workers)
        self.reserved[0].cancel()


@contextmanager
def hold_resources(
    cluster: ClusterConfig, actors: int, *, local: bool, remote: Judges | None = None
) -> Iterator[HeldResources]:
    """Hold room for the fewest workers, `actors` rollout actors and those of rewards, at once, until the block ends.

    Raises UserError if the cluster lacks what the run needs; one that may grow or be freed has `wait_s` for it.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = bundles_of(cluster, actors, remote := remote or {})
    missing = missing_of([bundle for role in bundles for bundle in role], nodes)
    if missing and local:
        raise UserError(_message(cluster, actors, remote, missing, "has only", ray.cluster_resources()))
    if missing:
        logger.info(f"waiting up to {cluster.wait_s:g} s for the cluster to grow: {missing}")
    reserved = [Reservation(role[0] if role else {}, len(role), essential=True) for role in bundles]
    groups: Sequence[PlacementGroup | None] | None = None
    try:
        _reserve(reserved)
        groups = _hold(bundles, cluster.wait_s, _GROWING_S if missing else _HALF_S)
        if groups is None:
            free = ray.cluster_resources() if missing else ray.available_resources()
            verb = f"had within {cluster.wait_s:g} s only"
            raise UserError(_message(cluster, actors, remote, missing or "others use what it has", verb, free))
        room = HeldResources(groups[0], groups[1], groups[2:], reserved)
        with repeating(room.renew, _RENEW_S, "renewing the reservation of room"):
            yield room
    finally:
        for reservation in reserved:
            reservation.cancel()
        _remove(groups or [])


def _reserve(reservations: Sequence[Reservation]) -> None:
    try:
        for reservation in reservations:
            reservation.renew()
    except GetTimeoutError as error:
        raise UserError(
            f"Ray's own coordinator of resources does not answer: {error}; see whether the cluster's head is too busy "
            "or out of memory (`ray status`), then run the same command again"
        ) from error


def _hold(roles: Sequence[list[Resources]], wait_s: float, half_s: float) -> list[PlacementGroup | None] | None:
    """A placement group for each role (None for one that needs nothing), all of them, or None within `wait_s`.

    A run that has only some of them for `half_s` gives them back and tries again a little later: otherwise two runs,
    or two trials of a search, could each keep half of the room for ever.
    """
    deadline, said = time.monotonic() + wait_s, False
    while True:
        groups, begun = [placement_group(bundles) if bundles else None for bundles in roles], time.monotonic()
        while not all(ready := [group is None or group.wait(0.1) for group in groups]):
            now = time.monotonic()
            if now > deadline or (any(ready) and now - begun > half_s):
                break
            if not said and now - begun > _HALF_S:
                said = True
                logger.info(f"waiting for room on the cluster, {deadline - now:.0f} s at most")
        else:
            return groups
        _remove(groups)
        if time.monotonic() > deadline:
            return None
        time.sleep(random.uniform(0.5, _HALF_S))


def _remove(groups: Sequence[PlacementGroup | None]) -> None:
    for group in filter(None, groups):
        remove_placement_group(group)


_EXPIRES_S = 120.0  # if the driver dies
_FIRST_ANSWER_S = 60.0  # its first answer is that of a process which starts, perhaps beside many others


class Reservation:
    """So many equal bundles that a run wishes for; renewed now and then, it says where there are how many.

    The autoscaler hears of it, and so do other runs: their extra actors make way for what is essential.
    """

    def __init__(self, bundle: Resources, count: int, *, essential: bool):
        self.name, self.bundle, self.count = f"rlr-ray-{uuid.uuid4().hex}", bundle, count
        self.autoscaler: ActorHandle | None = None
        self.priority: Any = None
        if (names := _autoscaling()) is not None:
            self.autoscaler = names[0]()
            self.priority = names[1].HIGH if essential else names[1].LOW

    def renew(self) -> Counter[str]:
        """How many of the bundles each node, by its id, has room for, besides all that comes before them.

        Raises RayError if Ray's coordinator of resources does not answer.
        """
        if not self.bundle or not self.count or self.autoscaler is None:
            return Counter()
        wishes = [self.bundle] * self.count
        request = self.autoscaler.request_resources.remote(self.name, wishes, _EXPIRES_S, priority=self.priority)
        ray.get(request, timeout=_FIRST_ANSWER_S)
        answer = self.autoscaler.get_reserved_resources.remote(self.name, recompute=True)
        nodes: dict[str, Resources] = ray.get(answer, timeout=_FIRST_ANSWER_S)
        kind, amount = next(iter(self.bundle.items()))
        return Counter({node: round(there.get(kind, 0) / amount) for node, there in nodes.items()})

    def cancel(self) -> None:
        if self.autoscaler is not None:
            self.autoscaler.cancel_request.remote(self.name)


@functools.cache
def _autoscaling() -> tuple[Callable[[], ActorHandle], Any] | None:
    """What gives Ray's coordinator of resources, and its priorities; None with a Ray that has them elsewhere."""
    place = "ray.data._internal.cluster_autoscaler"  # of no public API
    try:
        priority = importlib.import_module(f"{place}.base_autoscaling_coordinator").ResourceRequestPriority
        default = importlib.import_module(f"{place}.default_autoscaling_coordinator")
        return default.get_or_create_autoscaling_coordinator, priority
    except (ImportError, AttributeError) as error:
        logger.warning(
            f"Ray {ray.__version__} has no coordinator of resources where Ray 2.60 has it ({error}): the number of "
            "rollout actors stays at cluster.rollouts.min_actors; install the Ray of constraints.txt"
        )
        return None


# --- what a run needs, and where it would go


def bundles_of(cluster: ClusterConfig, actors: int, remote: Judges) -> list[list[Resources]]:
    """Of the fewest workers, then of so many rollout actors, then of each reward's actors; Ray refuses empty ones."""
    roles = [[cluster.worker.demand] * cluster.worker_range.min, [cluster.rollouts.demand] * actors]
    roles += [[reward.actors.demand] * reward.actors.replicas for reward in remote.values() if reward.actors]
    return [[bundle for bundle in role if bundle] for role in roles]


def missing_of(bundles: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> str:
    """What these nodes, empty, lack: a node that holds some process, or enough for all of them; "" if neither."""
    for bundle in bundles:
        if not any(_holds(node, bundle) for node in nodes):
            return f"no node has {listed(bundle)} for one process"
    there = sum_of(nodes)
    short = [kind for kind, much in sum_of(bundles).items() if _units(there[kind]) < _units(much)]
    return f"too little {' and '.join(short)} for all of them" if short else ""


def _message(
    cluster: ClusterConfig, actors: int, remote: Judges, why: str, verb: str, resources: Mapping[str, float]
) -> str:
    bundles = bundles_of(cluster, actors, remote)
    workers, total = cluster.worker_range.min, sum_of([one for role in bundles for one in role])
    rewards = "".join(
        f"; {reward.actors.replicas} actors of reward {label} of {listed(reward.actors.demand)}"
        for label, reward in remote.items()
        if reward.actors
    )
    there = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in total)
    lower = ["cluster.rollouts.min_actors", "cluster.rollouts.cpus", "cluster.workers"]
    lower += [f"actors.replicas, .cpus or .gpus of reward {label}" for label in remote]
    alone = "" if remote else ", or set cluster: none to run in this process"  # where actors are refused
    return (
        f"the run needs {listed(total)} ({workers} workers of {listed(cluster.worker.demand)}; "
        f"{actors} rollout actors of {listed(cluster.rollouts.demand)}{rewards}), but the cluster {verb} {there}: "
        f"{why}; lower {', '.join(lower[:-1])} or {lower[-1]}, add nodes, raise cluster.wait_s if they come by "
        f"themselves{alone}"
    )


def place(bundles: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> list[int | None]:
    """A node for each bundle, None where there is none; near to what Ray does, but not the same.

    Those that ask for custom resources and GPUs go first, each to the node with the least that it does not ask for.
    """
    free, places = [dict(node) for node in nodes], dict[int, int | None]()
    for number in sorted(range(len(bundles)), key=lambda number: _scarcity(bundles[number]), reverse=True):
        bundle = bundles[number]
        spare = {
            node: _scarcity({kind: much for kind, much in there.items() if kind == "CPU" or kind not in bundle})
            for node, there in enumerate(free)
            if _holds(there, bundle)
        }
        places[number] = where = min(spare, key=lambda node: spare[node], default=None)
        if where is not None:
            free[where] = {kind: much - bundle.get(kind, 0) for kind, much in free[where].items()}
    return [places[number] for number in range(len(bundles))]


_USUAL = ("CPU", "GPU", "memory", "object_store_memory")


def _scarcity(resources: Mapping[str, float]) -> tuple[float, float, float]:
    """How much there is of what is scarce, the scarcest first."""
    custom = sum(much for kind, much in resources.items() if kind not in _USUAL and not kind.startswith("node:"))
    return custom, resources.get("GPU", 0), resources.get("CPU", 0)


def _holds(node: Mapping[str, float], bundle: Resources) -> bool:
    return all(_units(node.get(kind, 0)) >= _units(much) for kind, much in bundle.items())


def _units(amount: float) -> int:
    """Ray counts in ten-thousandths."""
    return round(amount * 10_000)


def sum_of(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for bundle in bundles:
        for kind, much in bundle.items():
            total[kind] += much
    return total


def listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount) or "nothing"


def enter(folder: str) -> None:
    """Change to the driver's working folder. Raises UserError if this node does not have it."""
    if not os.path.isdir(folder):
        raise UserError(
            f"node {platform.node()} has no folder {folder}, where the run was started; every node needs the run's "
            "files at the same path (file_mounts in cluster.yaml, or a shared disk)"
        )
    os.chdir(folder)


def enter_and_call(folder: str, function: Callable[..., Any], config: RunConfig, *arguments: Any) -> Any:
    """What the function returns of a run, in the driver's working folder."""
    enter(folder)
    prepare_process(config.threads)
    return function(config, *arguments)
