"""Whether what a test took of Ray is free again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

KINDS = ("RewardActor", "RolloutActor", "RunCoordinator", "RayTrainWorker", "Trial", "Synthetic", "Dies")


def living(*kinds: str) -> dict[str, dict[str, Any]]:
    every = ray._private.state.actors().items()
    return {name: actor for name, actor in every if actor["State"] != "DEAD" and actor["ActorClassName"] in kinds}


def _taken() -> tuple[set[str], float]:
    """Actors of ours and placement groups that there are; free CPUs."""
    groups = ray.util.placement_group_table().items()
    names = {name for name, group in groups if group["state"] != "REMOVED"}
    return names | living(*KINDS).keys(), ray.available_resources().get("CPU", 0.0)


@contextmanager
def nothing_left() -> Iterator[None]:
    """Asserts that all that the block took is free again."""
    before, cpus = _taken()
    yield
    for _ in range(100):
        names, free = _taken()
        if names <= before and free >= cpus:
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {names - before}, {free} of {cpus} CPUs free")
