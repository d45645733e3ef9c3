"""What a run's processes take, and which nodes could hold them. Knows nothing of Ray."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from rlr_ray.cluster_config import ClusterConfig, Resources
from rlr_ray.reward_config import Judges

_USUAL = ("CPU", "GPU", "memory", "object_store_memory")


def missing_of(bundles: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> str:
    """What these nodes, empty, lack: a node that holds some process, or enough for all of them; "" if neither."""
    for bundle in bundles:
        if not any(_holds(node, bundle) for node in nodes):
            return f"no node has {listed(bundle)} for one process"
    there = sum_of(nodes)
    short = [kind for kind, much in sum_of(bundles).items() if _units(there[kind]) < _units(much)]
    return f"too little {' and '.join(short)} for all of them" if short else ""


def sum_of(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for bundle in bundles:
        for kind, much in bundle.items():
            total[kind] += much
    return total


def _units(amount: float) -> int:
    """Ray counts in ten-thousandths."""
    return round(amount * 10_000)


def _holds(node: Mapping[str, float], bundle: Resources) -> bool:
    return all(_units(node.get(kind, 0)) >= _units(much) for kind, much in bundle.items())


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


def _scarcity(resources: Mapping[str, float]) -> tuple[float, float, float]:
    """How much there is of what is scarce, the scarcest first."""
    custom = sum(much for kind, much in resources.items() if kind not in _USUAL and not kind.startswith("node:"))
    return custom, resources.get("GPU", 0), resources.get("CPU", 0)


def bundles_of(cluster: ClusterConfig, actors: int, apart: Judges) -> list[list[Resources]]:
    """Of the fewest workers, then of so many rollout actors, then of each reward's actors; Ray refuses empty ones."""
    roles = [[cluster.worker.demand] * cluster.worker_range.min, [cluster.rollouts.demand] * actors]
    roles += [[reward.actors.demand] * reward.actors.replicas for reward in apart.values() if reward.actors]
    return [[bundle for bundle in role if bundle] for role in roles]


def listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount) or "nothing"
