"""The doctor's look at every node of a cluster, and where a run's processes would go."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlr_ray.cluster.launch import connected
from rlr_ray.cluster.machine import MachineReport, Verdict, examine
from rlr_ray.cluster.resources import bundles_of, listed, place
from rlr_ray.config.cluster import ClusterConfig, Resources
from rlr_ray.config.run import RunConfig

_ANSWER_S = 60.0  # of all nodes
_GROWS_S = 60.0  # who waits longer for room expects nodes to come


def examine_cluster(config: RunConfig, cluster: ClusterConfig, token: str) -> tuple[list[MachineReport], list[Verdict]]:
    """The nodes' reports, and verdicts on the nodes and the placement."""
    with connected(cluster):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        names = [f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})" for node in nodes]
        resources = [node["Resources"] for node in nodes]
        actors = cluster.rollouts.min_actors if config.needs_actors else 0
        bundles = bundles_of(cluster, actors, config.remote_rewards)
        places = place([bundle for role in bundles for bundle in role], resources)
        writers = set(places[: len(bundles[0])])  # nodes of workers; actors write nothing
        calls = [_ask(config, nodes[i], token, names[i], i in writers) for i in range(len(nodes))]
        reports, troubles = _answers(calls, names)
    well = Verdict(not troubles, "nodes", "; ".join(troubles) or f"{len(nodes)} answered", "mend or remove them")
    return reports, [well, _gpus(reports, resources), _placement(config, cluster, bundles, places, names)]


def _ask(config: RunConfig, node: dict[str, Any], token: str, name: str, writes: bool) -> ray.ObjectRef:
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(examine).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
    return task.remote(name, str(config.folder.parent) if writes else "", token, os.getcwd())


def _answers(calls: list[ray.ObjectRef], names: list[str]) -> tuple[list[MachineReport], list[str]]:
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=_ANSWER_S)
    reports, troubles = [], []
    for call, name in zip(calls, names, strict=True):
        try:
            if call not in done:
                raise TimeoutError(f"no answer within {_ANSWER_S:g} s")
            reports.append(ray.get(call))
        except (RayError, TimeoutError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            troubles.append(f"{name}: {lines[-1] if lines else type(error).__name__}")
    return reports, troubles


def _gpus(reports: list[MachineReport], resources: list[Resources]) -> Verdict:
    """Whether torch can use the GPUs of each node that has some."""
    with_gpus = sum(bool(node.get("GPU")) for node in resources)
    blind = [report.name for report in reports if report.gpus and not report.cuda]
    return Verdict(
        not blind,
        "GPUs",
        f"torch on {', '.join(blind)} is built without CUDA" if blind else f"{with_gpus} nodes have some",
        "install a CUDA build of torch there",
    )


def _placement(
    config: RunConfig,
    cluster: ClusterConfig,
    bundles: list[list[Resources]],
    places: list[int | None],
    names: list[str],
) -> Verdict:
    """Where workers and actors would go, as many as the run waits for, on empty nodes.

    Spot nodes that have yet to come are no trouble if the run waits for them.
    """
    kinds = ["worker", "rollout actor", *(f"actor of reward {label}" for label in config.remote_rewards)]
    roles = [(kind, bundle) for kind, each in zip(kinds, bundles, strict=True) for bundle in each]
    lines = [
        f"{role} ({listed(bundle)}) -> {'a node that has to come' if where is None else names[where]}"
        for (role, bundle), where in zip(roles, places, strict=True)
    ]
    remedy = (
        f"add nodes, set cluster.wait_s ({cluster.wait_s:g} s) to the time they take to come, or lower what it takes"
    )
    well = None not in places or cluster.wait_s > _GROWS_S
    return Verdict(well, "placement", "; ".join(lines) or "nothing to place", remedy)
