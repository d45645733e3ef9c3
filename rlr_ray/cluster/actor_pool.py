"""The pool of rollout actors: never fewer than asked for, more while the cluster has room."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlr_ray.cluster.coordinator import repeating
from rlr_ray.cluster.jobs import MAX_RETRIES
from rlr_ray.cluster.resources import HeldResources, Reservation
from rlr_ray.cluster.rollouts import RolloutActor, await_ready
from rlr_ray.cluster.seats import Seat
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.train.engine import RemoteRewards

logger = logging.getLogger(__name__)
_LOOK_S = 3.0  # between two looks at how much room there is


class ActorPool:
    """Starts and ends rollout actors. The first `min_actors` live in the room that is held for them.

    Ray starts an actor again that died, wherever there is room. The actors beyond `min_actors` come and go with what
    the cluster has left beside the workers; while there is less than asked for, the autoscaler knows it.
    """

    def __init__(
        self,
        config: RunConfig,
        cluster: ClusterConfig,
        room: HeldResources,
        coordinator: ActorHandle,
        remote: RemoteRewards,
    ):
        self.config, self.room, self.coordinator = config.on_actors, room, coordinator
        self.remote, self.coordinator_name = remote, ray.get(coordinator.called.remote())
        self.rollouts = cluster.rollouts
        self.names = (f"{config.name}-{number}" for number in itertools.count())
        self.first: dict[str, ActorHandle] = {}
        self.more: dict[str, tuple[str, ActorHandle]] = {}  # with the node of each
        wanted = self.rollouts.max_actors - self.rollouts.min_actors
        self.wished = Reservation(self.rollouts.demand, wanted, essential=False)

    @contextmanager
    def running(self) -> Iterator[ActorPool]:
        """Start the first actors, which then build their engines; grow and shrink until the block ends, then end."""
        count, group = self.rollouts.min_actors, self.room.actors
        if count:
            logger.info(f"starting {count} rollout actor{'s' * (count > 1)}")
        place = PlacementGroupSchedulingStrategy(group) if group else "DEFAULT"
        try:
            for _ in range(count):
                self.first[next(self.names)] = self._actor(place)
            with repeating(self.look, _LOOK_S, "looking for room for more rollout actors"):
                yield self
        finally:
            for actor in self._actors().values():
                ray.kill(actor)
            self.wished.cancel()

    def await_ready(self) -> None:
        """Wait until each of the first actors has built its engine. Raises UserError if one cannot."""
        ready = {f"rollout actor {name}": actor.ready.remote for name, actor in self.first.items()}
        await_ready(ready, MAX_RETRIES + 1, "if memory ran out, lower cluster.rollouts.min_actors")
        self._publish()

    def look(self) -> None:
        """Start or end actors beyond the first, so that they fill each node, once the workers have their places."""
        if not ray.get(self.coordinator.started.remote()):
            return
        free, before = self.wished.renew(), list(self.more)
        for name, (node, actor) in list(self.more.items()):
            free[node] -= 1
            if free[node] < 0:
                ray.kill(actor)
                del self.more[name]
        for node in (+free).elements():
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            self.more[next(self.names)] = node, self._actor(here)
        if list(self.more) != before:
            self._publish()
        if len(self.more) != len(before):
            logger.info(f"there is room for {len(self._actors())} rollout actors")

    def _actor(self, place: Any) -> ActorHandle:
        actor = ray.remote(RolloutActor).options(
            num_cpus=self.rollouts.cpus,
            num_gpus=self.rollouts.gpus,
            resources=self.rollouts.resources,
            max_restarts=-1,
            scheduling_strategy=place,
        )
        return actor.remote(self.config, os.getcwd(), generator_checksum(), self.remote, Seat(self.coordinator_name))

    def _actors(self) -> dict[str, ActorHandle]:
        return self.first | {name: actor for name, (_, actor) in self.more.items()}

    def _publish(self) -> None:
        self.published = ray.put(self._actors())
        self.coordinator.set_actors.remote([self.published])
