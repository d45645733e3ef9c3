"""The doctor's look at every node of a cluster, and where a run's processes would go."""

from __future__ import annotations

from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlr_ray.cluster.launch import connected
from rlr_ray.cluster.preflight import bundles_of, listed, place
from rlr_ray.cluster_config import ClusterConfig, Resources
from rlr_ray.config import RunConfig
from rlr_ray.doctor import MachineReport, Verdict, examine

_ANSWER_S = 60.0  # of a node


def examine_cluster(
    config: RunConfig, cluster: ClusterConfig, token: str, say: Callable[[str], None]
) -> tuple[list[MachineReport], list[Verdict]]:
    """Every node's report, and verdicts on the nodes and the placement."""
    with connected(cluster, say):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        calls = {}
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(examine).options(num_cpus=0, scheduling_strategy=here)
            calls[node["NodeManagerHostname"], node["NodeID"]] = task.remote(str(config.folder.parent), token)
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ANSWER_S)
        silent = [name for (name, _), call in calls.items() if call not in done]
        nodes_well = Verdict(
            not silent, "nodes", f"{len(done)} of {len(calls)} answered", f"no answer within {_ANSWER_S:g} s: {silent}"
        )
        reports = ray.get(done)
        resources = [node["Resources"] for node in nodes]
        names = [f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})" for node in nodes]
        return reports, [nodes_well, placement(config, cluster, resources, names)]


def placement(config: RunConfig, cluster: ClusterConfig, nodes: list[Resources], names: list[str]) -> Verdict:
    """Where workers and actors would go, as many as the config asks for at least, on empty nodes."""
    actors = cluster.rollouts.min_actors if config.plan_shape.has_zeroth_order else 0
    roles = dict(zip(("worker", "rollout actor"), bundles_of(cluster, actors), strict=True))
    wanted = [(role, bundle) for role, bundles in roles.items() for bundle in bundles]
    places = place([bundle for _, bundle in wanted], nodes)
    lines = [
        f"{role} ({listed(bundle)}) -> {'no node' if where is None else names[where]}"
        for (role, bundle), where in zip(wanted, places, strict=True)
    ]
    remedy = "lower what the role takes (cluster.worker, cluster.rollouts), or add nodes"
    return Verdict(None not in places, "placement", "; ".join(lines) or "nothing to place", remedy)
