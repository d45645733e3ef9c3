"""Whether the cluster can hold the run, before anything waits for it."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Mapping

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rlr_ray.config import ClusterConfig
from rlr_ray.errors import UserError

_ANSWER_S = 5.0  # for a Ray that runs to accept a connection


def check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at a `host:port`; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", "local", or no address
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray answers at {address} ({error}); set cluster.address or RAY_ADDRESS to one that runs, "
            "or leave both out to start one on this machine"
        ) from error


def check_room(cluster: ClusterConfig, say: Callable[[str], None], *, local: bool) -> None:
    """Raise UserError if the cluster lacks what the run needs; one that may grow or be freed has `wait_s` for it."""
    missing = _missing(cluster)
    if missing and local:
        raise UserError(_message(cluster, "has only", ray.cluster_resources()))
    if missing:
        say(f"waiting up to {cluster.wait_s:g} s for the cluster to grow to {_list(_demand(cluster))}")
    group = placement_group(_bundles(cluster))
    try:
        if not group.wait(cluster.wait_s):
            free = ray.cluster_resources() if missing else ray.available_resources()
            raise UserError(_message(cluster, f"had within {cluster.wait_s:g} s only", free))
    finally:
        remove_placement_group(group)


def _bundles(cluster: ClusterConfig) -> list[dict[str, float]]:
    bundles = [cluster.worker_demand] * cluster.workers + [cluster.rollout_demand] * cluster.rollout_actors
    named = [{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    return [bundle for bundle in named if bundle]  # Ray refuses empty ones


def _demand(cluster: ClusterConfig) -> dict[str, float]:
    """Sum over all roles, by kind of resource."""
    total: Counter[str] = Counter()
    for bundle in _bundles(cluster):
        total.update(bundle)
    return dict(total)


def _missing(cluster: ClusterConfig) -> bool:
    there = ray.cluster_resources()
    return any(amount > there.get(kind, 0) for kind, amount in _demand(cluster).items())


def _list(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount) or "nothing"


def _message(cluster: ClusterConfig, verb: str, resources: Mapping[str, float]) -> str:
    demand = _demand(cluster)
    there = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in demand)
    return (
        f"the run needs {_list(demand)} ({cluster.workers} workers of {_list(cluster.worker_demand)}; "
        f"{cluster.rollout_actors} rollout actors of {_list(cluster.rollout_demand)}), but the cluster {verb} {there}; "
        "lower cluster.rollout_actors, cluster.rollout_cpus or cluster.workers, add nodes, or set cluster: none to run "
        "in this process"
    )
