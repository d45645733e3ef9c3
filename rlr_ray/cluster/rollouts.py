"""Actors that run the perturbation rollouts, and the pool that hands them out."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlr_ray.cluster.folder import enter
from rlr_ray.config import ClusterConfig, RunConfig
from rlr_ray.core.gradient import RolloutResult
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.engine import Engine, RolloutRequest
from rlr_ray.errors import UserError

_RETURN_S = 0.2  # between two questions whether a lost actor has been restarted


class RolloutActor:
    """Holds an engine and nothing that a restart would lose."""

    def __init__(self, config: RunConfig, folder: str):
        self.config, self.folder = config, folder

    @functools.cached_property
    def engine(self) -> Engine:
        enter(self.folder)
        return Engine(self.config)

    def checksum(self) -> float:
        _ = self.engine  # built here, so that an error of the config shows before training starts
        return generator_checksum()

    def run(self, request: RolloutRequest, indices: range) -> RolloutResult:
        return self.engine.rollout(request, indices)


def start_actors(
    config: RunConfig, cluster: ClusterConfig, group: PlacementGroup | None, folder: str
) -> list[ActorHandle]:
    """Start the actors in the room that is held for them, and build their engines.

    Raises UserError if one cannot, or draws other random numbers.
    """
    actor = ray.remote(RolloutActor).options(
        num_cpus=cluster.rollouts.cpus,
        num_gpus=cluster.rollouts.gpus,
        resources=cluster.rollouts.resources,
        max_restarts=-1,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group) if group else "DEFAULT",
    )
    actors = [actor.remote(config, folder) for _ in range(cluster.rollouts.max_actors)]
    try:
        for checksum in ray.get([handle.checksum.remote() for handle in actors]):
            _check(checksum)
    except RayTaskError as error:
        raise error.cause from None
    return actors


def _check(checksum: float) -> None:
    if checksum != generator_checksum():
        raise UserError(
            f"a rollout actor draws other random numbers than the trainer (checksum {checksum}, not "
            f"{generator_checksum()}); install the same torch version on every node"
        )


class RolloutPool:
    """Rollouts on actors, each with one chunk at a time, while the caller goes on.

    A result depends on its request and indices alone, so the chunk of an actor that died is simply run again, by
    whichever actor is free first; the dead one is used again once Ray has restarted it.
    """

    def __init__(self, actors: Sequence[ActorHandle], max_retries: int):
        self.actors = list(actors)
        self.max_retries = max_retries

    def __call__(self, request: RolloutRequest, chunks: Sequence[range]) -> Iterator[RolloutResult]:
        update = _Update(ray.put(request), chunks, self.max_retries)  # theta is sent once, for any number of actors
        for actor in self.actors:
            threading.Thread(target=update.serve, args=(actor,), daemon=True).start()
        return update.results(len(self.actors))


class _Update:
    """The chunks of one update: those that wait for an actor, and what has come back."""

    def __init__(self, request: ray.ObjectRef, chunks: Sequence[range], max_retries: int):
        self.request, self.max_retries, self.count = request, max_retries, len(chunks)
        self.waiting: queue.SimpleQueue[tuple[range, int] | None] = queue.SimpleQueue()  # chunk, tries; None: all done
        self.done: queue.SimpleQueue[RolloutResult | Exception] = queue.SimpleQueue()
        for chunk in chunks:
            self.waiting.put((chunk, 0))

    def results(self, actors: int) -> Iterator[RolloutResult]:
        """Every chunk's result, as they come. Raises what a rollout raised, or if every actor is gone for good."""
        received, gone = 0, 0
        try:
            while received < self.count:
                item = self.done.get()
                if isinstance(item, ActorDiedError):
                    gone += 1
                    if gone == actors:
                        raise item
                elif isinstance(item, Exception):
                    raise item
                else:
                    received += 1
                    yield item
        finally:
            for _ in range(actors):
                self.waiting.put(None)

    def serve(self, actor: ActorHandle) -> None:
        """Keep one actor busy until the update is over (in a thread of its own)."""
        while (item := self.waiting.get()) is not None:
            chunk, tries = item
            try:
                try:
                    self.done.put(ray.get(actor.run.remote(self.request, chunk)))
                except (RayActorError, OutOfMemoryError) as error:  # the latter: Ray ended it to save the node
                    self._run_again(chunk, tries, error)
                    _await_return(actor)
            except RayTaskError as error:  # the rollout itself failed; trying again would fail again
                self.done.put(error.cause)
            except ActorDiedError as error:  # for good: Ray will not restart it
                self.done.put(error)
                return
            except Exception as error:  # whatever it is, the caller must not wait for ever
                self.done.put(error)

    def _run_again(self, chunk: range, tries: int, error: Exception) -> None:
        if tries == self.max_retries:
            raise UserError(
                f"rollouts {chunk.start} to {chunk.stop - 1} lost their actor {tries + 1} times; the last: {error}; "
                "if memory ran out, lower estimator.zeroth_order.chunk_size or cluster.rollouts.max_actors"
            ) from error
        self.waiting.put((chunk, tries + 1))


def _await_return(actor: ActorHandle) -> None:
    """Wait until Ray has restarted an actor, wherever that is. Raises ActorDiedError if it will not."""
    while True:
        try:
            return _check(ray.get(actor.checksum.remote()))
        except ActorDiedError:
            raise
        except (RayActorError, OutOfMemoryError):
            time.sleep(_RETURN_S)
