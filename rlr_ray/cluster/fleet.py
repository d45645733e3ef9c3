"""The crew of rollout actors: never fewer than asked for, more while the cluster has room."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlr_ray.cluster.reservation import Reservation
from rlr_ray.cluster.rollouts import RolloutActor
from rlr_ray.cluster_config import ClusterConfig
from rlr_ray.config import RunConfig
from rlr_ray.core.seeds import generator_checksum

_LOOK_S = 2.0  # between two looks at how much room there is


class Fleet:
    """Starts and ends rollout actors. The first `min_actors` live in the room that is held for them.

    Ray starts an actor again that died, wherever there is room. The actors beyond `min_actors` come and go with what
    the cluster has left beside the workers; while there is less than asked for, the autoscaler knows it.
    """

    def __init__(
        self,
        config: RunConfig,
        cluster: ClusterConfig,
        room: PlacementGroup | None,  # None if actors need nothing
        mailbox: ActorHandle,
        folder: str,
    ):
        self.config, self.folder, self.mailbox, self.room = config.on(cluster.rollouts.gpus), folder, mailbox, room
        self.rollouts = cluster.rollouts
        self.names = (f"{config.name}-{number}" for number in itertools.count())
        self.base: dict[str, ActorHandle] = {}
        self.more: dict[str, ActorHandle] = {}
        run = f"rlr-ray-{config.name}-{uuid.uuid4().hex}"
        least, most, demand = self.rollouts.min_actors, self.rollouts.max_actors, self.rollouts.demand
        self.essential = Reservation(f"{run}-first", demand, least, essential=True)
        self.wished = Reservation(f"{run}-more", demand, most - least, essential=False)

    def start(self) -> None:
        """Start the first actors and wait until each has built its engine. Raises UserError if one cannot."""
        self.essential.renew()
        for _ in range(self.rollouts.min_actors):
            self.base[next(self.names)] = self._actor(self.room)
        try:
            ray.get([actor.ready.remote(generator_checksum()) for actor in self.base.values()])
        except RayTaskError as error:
            raise error.cause from None
        self._publish()

    def fit(self) -> None:
        """Start or end actors beyond the first ones, so that they fill what room there is."""
        self.essential.renew()
        room = self.wished.renew()
        if room == len(self.more):
            return
        while len(self.more) > room:
            ray.kill(self.more.popitem()[1])
        while len(self.more) < room:
            self.more[next(self.names)] = self._actor(None)
        self._publish()

    def _actor(self, room: PlacementGroup | None) -> ActorHandle:
        actor = ray.remote(RolloutActor).options(
            num_cpus=self.rollouts.cpus,
            num_gpus=self.rollouts.gpus,
            resources=self.rollouts.resources,
            max_restarts=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(room) if room else "DEFAULT",
        )
        return actor.remote(self.config, self.folder)

    def _publish(self) -> None:
        self.crew = ray.put(self.base | self.more)
        self.mailbox.set_crew.remote([self.crew])

    def end(self) -> None:
        for actor in (self.base | self.more).values():
            ray.kill(actor)
        for reservation in (self.essential, self.wished):
            reservation.cancel()


@contextmanager
def growing(fleet: Fleet, mailbox: ActorHandle, say: Callable[[str], None]) -> Iterator[None]:
    """Fit the fleet to the cluster until the block ends, from the time when the workers have their places."""
    ended = threading.Event()

    def look() -> None:
        told = ""
        while not ended.wait(_LOOK_S):
            before = len(fleet.more)
            try:
                if ray.get(mailbox.started.remote()):
                    fleet.fit()
                news = f"there is room for {len(fleet.base) + len(fleet.more)} rollout actors"
            except RayError as error:  # the coordinator was lost, say: what runs goes on, and the next look may do
                before, news = -1, f"cannot look for more room: {error}"
            if len(fleet.more) != before and news != told:
                told = news
                say(news)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
