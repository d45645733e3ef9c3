"""Whether the cluster can hold the run, before anything waits for it; and the room it then keeps."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlr_ray.config import ClusterConfig
from rlr_ray.errors import UserError

_ANSWER_S = 5.0  # for a Ray that runs to accept a connection


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
    """Resources that are held for the run: a bundle for each worker, and one for each rollout actor."""

    workers: PlacementGroup
    actors: PlacementGroup | None  # None if actors need nothing

    def release_workers(self) -> None:
        """Give the workers' share to the TorchTrainer, which makes a placement group of its own."""
        remove_placement_group(self.workers)


@contextmanager
def room(cluster: ClusterConfig, actors: int, say: Callable[[str], None], *, local: bool) -> Iterator[Room]:
    """Hold room for the workers and `actors` rollout actors, all at once, until the block ends.

    Raises UserError if the cluster lacks what the run needs; one that may grow or be freed has `wait_s` for it.
    """
    demand = _demand(cluster, actors)
    missing = any(amount > ray.cluster_resources().get(kind, 0) for kind, amount in demand.items())
    if missing and local:
        raise UserError(_message(cluster, actors, "has only", ray.cluster_resources()))
    if missing:
        say(f"waiting up to {cluster.wait_s:g} s for the cluster to grow to {_list(demand)}")
    groups = [placement_group(bundles) for bundles in _bundles(cluster, actors) if bundles]
    deadline = time.monotonic() + cluster.wait_s
    try:
        if not all(group.wait(max(deadline - time.monotonic(), 0.1)) for group in groups):
            free = ray.cluster_resources() if missing else ray.available_resources()
            raise UserError(_message(cluster, actors, f"had within {cluster.wait_s:g} s only", free))
        yield Room(groups[0], groups[1] if len(groups) > 1 else None)
    finally:
        for group in groups:
            remove_placement_group(group)


def _bundles(cluster: ClusterConfig, actors: int) -> list[list[dict[str, float]]]:
    """Of the workers, then of the actors; Ray refuses empty ones."""
    roles = ([cluster.worker.demand] * cluster.worker_range.min, [cluster.rollouts.demand] * actors)
    named = [[{kind: amount for kind, amount in bundle.items() if amount} for bundle in role] for role in roles]
    return [[bundle for bundle in role if bundle] for role in named]


def _demand(cluster: ClusterConfig, actors: int) -> dict[str, float]:
    """Sum over all roles, by kind of resource."""
    total: Counter[str] = Counter()
    for role in _bundles(cluster, actors):
        for bundle in role:
            total.update(bundle)
    return dict(total)


def _list(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount) or "nothing"


def _message(cluster: ClusterConfig, actors: int, verb: str, resources: Mapping[str, float]) -> str:
    demand = _demand(cluster, actors)
    there = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in demand)
    return (
        f"the run needs {_list(demand)} ({cluster.worker_range.min} workers of {_list(cluster.worker.demand)}; "
        f"{actors} rollout actors of {_list(cluster.rollouts.demand)}), but the cluster {verb} {there}; "
        "lower cluster.rollouts.min_actors, cluster.rollouts.cpus or cluster.workers, add nodes, or set cluster: none "
        "to run in this process"
    )
