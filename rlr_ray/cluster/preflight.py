"""Whether the cluster can hold the run, before anything waits for it; and the room it then keeps."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlr_ray.cluster.background import repeating
from rlr_ray.cluster.placement import bundles_of, listed, missing_of, sum_of
from rlr_ray.cluster.reservation import Reservation
from rlr_ray.cluster_config import ClusterConfig, Resources
from rlr_ray.errors import UserError
from rlr_ray.reward_config import Judges

_ANSWER_S = 5.0  # for a Ray that runs to accept a connection
_HALF_S = 5.0  # that a run keeps half of its room while it waits for others to free the other half
_GROWING_S = 120.0  # the same while it waits for new nodes
_RENEW_S = 10.0  # between two words to Ray's coordinator that the room is still needed


def check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at a `host:port`; Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise UserError(
            f"the address {address} is one for Ray's client, which cannot run a trainer; run on the cluster itself: "
            "`ray submit cluster.yaml train.py -- --config ...`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto", "local", or no address
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray answers at {address} ({error}); set cluster.address or RAY_ADDRESS to one that runs, "
            "or leave both out to start one on this machine"
        ) from error


@dataclass(frozen=True)
class Room:
    """Resources that are held for the run: a bundle for each worker, first rollout actor and actor of a reward."""

    workers: PlacementGroup | None  # None if they need nothing
    actors: PlacementGroup | None  # likewise
    rewards: Sequence[PlacementGroup | None]  # likewise, of each reward that has actors
    reserved: Sequence[Reservation]  # the same, known to Ray's coordinator: other runs' extra actors make way

    def renew(self) -> None:
        """All but the workers' share."""
        with suppress(RayError):  # the coordinator was lost, say: what is placed stays so, and the next time may do
            for reservation in self.reserved[1:]:
                reservation.renew()

    def release_workers(self) -> None:
        """Give the workers' share to the TorchTrainer, which makes a placement group and a reservation of its own."""
        if self.workers:
            remove_placement_group(self.workers)
        self.reserved[0].cancel()


@contextmanager
def room(
    cluster: ClusterConfig, actors: int, say: Callable[[str], None], *, local: bool, apart: Judges | None = None
) -> Iterator[Room]:
    """Hold room for the fewest workers, `actors` rollout actors and those of rewards, at once, until the block ends.

    Raises UserError if the cluster lacks what the run needs; one that may grow or be freed has `wait_s` for it.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles = bundles_of(cluster, actors, apart := apart or {})
    missing = missing_of([bundle for role in bundles for bundle in role], nodes)
    if missing and local:
        raise UserError(_message(cluster, actors, apart, missing, "has only", ray.cluster_resources()))
    if missing:
        say(f"waiting up to {cluster.wait_s:g} s for the cluster to grow: {missing}")
    reserved = [Reservation(role[0] if role else {}, len(role), essential=True) for role in bundles]
    groups: Sequence[PlacementGroup | None] | None = ()
    try:
        _reserve(reserved)
        groups = _hold(bundles, cluster.wait_s, _GROWING_S if missing else _HALF_S, say)
        if groups is None:
            free = ray.cluster_resources() if missing else ray.available_resources()
            verb = f"had within {cluster.wait_s:g} s only"
            raise UserError(_message(cluster, actors, apart, missing or "others use what it has", verb, free))
        held = Room(groups[0], groups[1], groups[2:], reserved)
        with repeating(held.renew, _RENEW_S):
            yield held
    finally:
        for reservation in reserved:
            reservation.cancel()
        _remove(groups or ())


def _reserve(reservations: Sequence[Reservation]) -> None:
    try:
        for reservation in reservations:
            reservation.renew()
    except GetTimeoutError as error:
        raise UserError(
            f"Ray's own coordinator of resources does not answer: {error}; see whether the cluster's head is too busy "
            "or out of memory (`ray status`), then run the same command again"
        ) from error


def _hold(
    roles: Sequence[list[Resources]], wait_s: float, half_s: float, say: Callable[[str], None]
) -> list[PlacementGroup | None] | None:
    """A placement group for each role (None for one that needs nothing), all of them, or None within `wait_s`.

    A run that has only some of them for `half_s` gives them back and tries again a little later: otherwise two runs,
    or two trials of a search, could each keep half of the room for ever.
    """
    deadline, said = time.monotonic() + wait_s, False
    while True:
        groups, begun = [placement_group(bundles) if bundles else None for bundles in roles], time.monotonic()
        while not all(held := [group is None or group.wait(0.1) for group in groups]):
            now = time.monotonic()
            if now > deadline or (any(held) and now - begun > half_s):
                break
            if not said and now - begun > _HALF_S:
                said = True
                say(f"waiting for room on the cluster, {deadline - now:.0f} s at most")
        else:
            return groups
        _remove(groups)
        if time.monotonic() > deadline:
            return None
        time.sleep(random.uniform(0.5, _HALF_S))


def _remove(groups: Sequence[PlacementGroup | None]) -> None:
    for group in filter(None, groups):
        remove_placement_group(group)


def _message(
    cluster: ClusterConfig, actors: int, apart: Judges, why: str, verb: str, resources: Mapping[str, float]
) -> str:
    bundles = bundles_of(cluster, actors, apart)
    workers, total = cluster.worker_range.min, sum_of([one for role in bundles for one in role])
    rewards = "".join(
        f"; {reward.actors.replicas} actors of reward {label} of {listed(reward.actors.demand)}"
        for label, reward in apart.items()
        if reward.actors
    )
    there = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in total)
    lower = ["cluster.rollouts.min_actors", "cluster.rollouts.cpus", "cluster.workers"]
    lower += [f"actors.replicas, .cpus or .gpus of reward {label}" for label in apart]
    alone = "" if apart else ", or set cluster: none to run in this process"  # where actors are refused
    return (
        f"the run needs {listed(total)} ({workers} workers of {listed(cluster.worker.demand)}; "
        f"{actors} rollout actors of {listed(cluster.rollouts.demand)}{rewards}), but the cluster {verb} {there}: "
        f"{why}; lower {', '.join(lower[:-1])} or {lower[-1]}, add nodes, raise cluster.wait_s if they come by "
        f"themselves{alone}"
    )
