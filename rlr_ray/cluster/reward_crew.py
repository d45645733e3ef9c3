"""The actors of a run's rewards: the driver starts them before all who ask them, and ends them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlr_ray.cluster.preflight import Room
from rlr_ray.cluster.reward_actors import RemoteReward, RewardActor
from rlr_ray.cluster.starting import await_ready
from rlr_ray.config import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.reward_config import JudgeConfig

_TRIES = 5  # of an actor that dies while it starts


@contextmanager
def rewards_apart(config: RunConfig, held: Room, say: Callable[[str], None]) -> Iterator[dict[str, RemoteReward]]:
    """The rewards and judges that have actors, by label, each built and in the room held for it, until the block ends.

    Raises UserError if one cannot be built.
    """
    crews: dict[str, list[ActorHandle]] = {label: [] for label in config.apart}
    try:
        for (label, reward), group in zip(config.apart.items(), held.rewards, strict=True):
            assert reward.actors is not None
            count = reward.actors.replicas
            say(f"starting {count} actor{'s' * (count > 1)} of reward {label}")
            for _ in range(count):
                crews[label].append(_start(label, reward, group, config.threads))
        ready = {
            f"actor {number} of reward {label!r}": actor.ready.remote
            for label, crew in crews.items()
            for number, actor in enumerate(crew)
        }
        await_ready(ready, _TRIES, "if memory ran out, lower the replicas of its actors")
        yield {
            label: RemoteReward(label, crews[label], reward.actors.timeout_s, reward.has_gradient)
            for label, reward in config.apart.items()
            if reward.actors is not None
        }
    finally:
        for crew in crews.values():
            for actor in crew:
                ray.kill(actor)


def _start(label: str, reward: JudgeConfig, group: PlacementGroup | None, threads: int) -> ActorHandle:
    actors = reward.actors
    assert actors is not None
    try:
        actor = ray.remote(RewardActor).options(
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            resources=actors.resources,
            runtime_env=actors.runtime_env or None,
            max_restarts=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group) if group else "DEFAULT",
        )
        folder = None if "working_dir" in actors.runtime_env else os.getcwd()
        return actor.remote(label, reward, folder, threads)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {label!r}: Ray refuses the runtime_env {actors.runtime_env} of its actors: {error}; see Ray's "
            "documentation of runtime environments"
        ) from error
