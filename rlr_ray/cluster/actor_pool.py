"""The crew of rollout actors: never fewer than asked for, more while the cluster has room."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlr_ray.cluster.coordinator import repeating
from rlr_ray.cluster.resources import Reservation, Room
from rlr_ray.cluster.rollouts import RolloutActor, await_ready
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.train.engine import Built

logger = logging.getLogger(__name__)
_LOOK_S = 3.0  # between two looks at how much room there is


class Fleet:
    """Starts and ends rollout actors. The first `min_actors` live in the room that is held for them.

    Ray starts an actor again that died, wherever there is room. The actors beyond `min_actors` come and go with what
    the cluster has left beside the workers; while there is less than asked for, the autoscaler knows it.
    """

    def __init__(
        self, config: RunConfig, cluster: ClusterConfig, room: Room, mailbox: ActorHandle, folder: str, built: Built
    ):
        self.config, self.folder, self.mailbox, self.room = config.on(cluster.rollouts.gpus), folder, mailbox, room
        self.built = built
        self.rollouts = cluster.rollouts
        self.names = (f"{config.name}-{number}" for number in itertools.count())
        self.base: dict[str, ActorHandle] = {}
        self.more: dict[str, tuple[str, ActorHandle]] = {}  # with the node of each
        wanted = self.rollouts.max_actors - self.rollouts.min_actors
        self.wished = Reservation(self.rollouts.demand, wanted, essential=False)

    def start(self) -> None:
        """Start the first actors, which then build their engines."""
        group = self.room.actors
        place = PlacementGroupSchedulingStrategy(group) if group else "DEFAULT"
        for _ in range(self.rollouts.min_actors):
            self.base[next(self.names)] = self._actor(place)

    def await_ready(self) -> None:
        """Wait until each of the first actors has built its engine. Raises UserError if one cannot."""
        ready = {f"rollout actor {name}": actor.ready.remote for name, actor in self.base.items()}
        await_ready(ready, self.rollouts.max_retries + 1, "if memory ran out, lower cluster.rollouts.min_actors")
        self._publish()

    def fit(self) -> None:
        """Start or end actors beyond the first ones, so that they fill what room each node has."""
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

    def _actor(self, place: Any) -> ActorHandle:
        actor = ray.remote(RolloutActor).options(
            num_cpus=self.rollouts.cpus,
            num_gpus=self.rollouts.gpus,
            resources=self.rollouts.resources,
            max_restarts=-1,
            scheduling_strategy=place,
        )
        return actor.remote(self.config, self.folder, generator_checksum(), self.built)

    def _actors(self) -> dict[str, ActorHandle]:
        return self.base | {name: actor for name, (_, actor) in self.more.items()}

    def _publish(self) -> None:
        self.crew = ray.put(self._actors())
        self.mailbox.set_crew.remote([self.crew])

    def end(self) -> None:
        for actor in self._actors().values():
            ray.kill(actor)
        self.wished.cancel()


@contextmanager
def growing(fleet: Fleet, mailbox: ActorHandle) -> Iterator[None]:
    """Fit the fleet to the cluster until the block ends, from the time when the workers have their places."""
    told = ""

    def look() -> None:
        nonlocal told
        before = len(fleet.more)
        try:
            if ray.get(mailbox.started.remote()):
                fleet.fit()
            news = f"there is room for {len(fleet.base) + len(fleet.more)} rollout actors"
        except RayError as error:  # the coordinator was lost, say: what runs goes on, and the next look may do
            before, news = -1, f"cannot look for more room: {error}"
        if len(fleet.more) != before and news != told:
            told = news
            logger.info(news)

    with repeating(look, _LOOK_S):
        yield
