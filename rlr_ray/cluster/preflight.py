"""Whether the cluster can hold the run, before anything waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rlr_ray.config import ClusterConfig
from rlr_ray.errors import UserError


def check_room(cluster: ClusterConfig, say: Callable[[str], None], *, local: bool) -> None:
    """Raise UserError if the cluster lacks what the run needs; one that may grow or be freed has `wait_s` for it."""
    missing = _missing(cluster)
    if missing and local:
        raise UserError(_message(cluster, "has only", ray.cluster_resources()))
    if missing:
        say(f"waiting up to {cluster.wait_s:g} s for the cluster to grow to {_needs(cluster)}")
    group = placement_group(_bundles(cluster))
    try:
        if not group.wait(cluster.wait_s):
            free = ray.cluster_resources() if missing else ray.available_resources()
            raise UserError(_message(cluster, f"had within {cluster.wait_s:g} s only", free))
    finally:
        remove_placement_group(group)


def _bundles(cluster: ClusterConfig) -> list[dict[str, float]]:
    worker = {"CPU": cluster.worker_cpus, "GPU": cluster.worker_gpus}
    actor = {"CPU": cluster.rollout_cpus, "GPU": cluster.rollout_gpus}
    bundles = [worker] * cluster.workers + [actor] * cluster.rollout_actors
    named = [{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    return [bundle for bundle in named if bundle]  # Ray refuses empty ones


def _demand(cluster: ClusterConfig, kind: str) -> float:
    return sum(bundle.get(kind, 0) for bundle in _bundles(cluster))


def _missing(cluster: ClusterConfig) -> bool:
    return any(_demand(cluster, kind) > ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))


def _needs(cluster: ClusterConfig) -> str:
    return ", ".join(f"{_demand(cluster, kind):g} {kind}" for kind in ("CPU", "GPU") if _demand(cluster, kind))


def _message(cluster: ClusterConfig, verb: str, resources: dict[str, Any]) -> str:
    there = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    return (
        f"the run needs {_needs(cluster)} "
        f"({cluster.workers} x {cluster.worker_cpus:g} CPU + {cluster.worker_gpus:g} GPU for workers, "
        f"{cluster.rollout_actors} x {cluster.rollout_cpus:g} CPU + {cluster.rollout_gpus:g} GPU for rollout "
        f"actors), but the cluster {verb} {there}; lower cluster.rollout_actors, cluster.rollout_cpus or "
        "cluster.workers, add nodes, or set cluster: none to run in this process"
    )
