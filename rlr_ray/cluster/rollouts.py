"""Actors that run the perturbation rollouts, and the pool that hands them out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from rlr_ray.config import ClusterConfig, RunConfig
from rlr_ray.core.gradient import RolloutResult
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.engine import Engine, RolloutRequest
from rlr_ray.errors import UserError


class RolloutActor:
    """Holds an engine and nothing that a restart would lose."""

    def __init__(self, config: RunConfig):
        self.config = config

    @functools.cached_property
    def engine(self) -> Engine:
        return Engine(self.config)

    def checksum(self) -> float:
        _ = self.engine  # built here, so that an error of the config shows before training starts
        return generator_checksum()

    def run(self, request: RolloutRequest, indices: range) -> RolloutResult:
        return self.engine.rollout(request, indices)


def start_actors(config: RunConfig, cluster: ClusterConfig) -> list[ActorHandle]:
    """Start the actors and build their engines. Raises UserError if one cannot, or draws other random numbers."""
    resources = {"num_cpus": cluster.rollout_cpus, "num_gpus": cluster.rollout_gpus}
    actor = ray.remote(RolloutActor).options(max_restarts=-1, **resources)
    actors = [actor.remote(config) for _ in range(cluster.rollout_actors)]
    try:
        checksums = ray.get([handle.checksum.remote() for handle in actors])
    except RayTaskError as error:
        raise error.cause from None
    checksum = generator_checksum()
    for number, found in enumerate(checksums):
        if found != checksum:
            raise UserError(
                f"rollout actor {number} draws other random numbers than the driver "
                f"(checksum {found}, not {checksum}); "
                "install the same torch version on every node"
            )
    return actors


class RolloutPool:
    """Rollouts on actors: dispatched at once, in turn; a chunk whose actor died goes to the next actor.

    A result depends on its request and indices alone, so running a chunk twice changes nothing.
    """

    def __init__(self, actors: Sequence[ActorHandle], max_retries: int):
        self.actors = list(actors)
        self.max_retries = max_retries

    def __call__(self, request: RolloutRequest, chunks: Sequence[range]) -> Iterator[RolloutResult]:
        reference = ray.put(request)  # once an update, whatever the number of actors
        turns = itertools.cycle(self.actors)
        pending = {}
        for chunk in chunks:
            actor = next(turns)
            pending[actor.run.remote(reference, chunk)] = (chunk, actor, 0)
        return self._collect(reference, pending)

    def _collect(
        self, reference: ray.ObjectRef, pending: dict[ray.ObjectRef, tuple[range, ActorHandle, int]]
    ) -> Iterator[RolloutResult]:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            chunk, actor, tries = pending.pop(ready)
            try:
                yield ray.get(ready)
            except RayTaskError as error:  # the rollout itself failed; trying again would fail again
                raise error.cause from None
            except RayActorError as error:
                if isinstance(error, ActorDiedError) and actor in self.actors and len(self.actors) > 1:
                    self.actors.remove(actor)
                self._check_retries(chunk, tries, error)
                other = self._next_after(actor)
                pending[other.run.remote(reference, chunk)] = (chunk, other, tries + 1)

    def _check_retries(self, chunk: range, tries: int, error: RayActorError) -> None:
        if tries == self.max_retries:
            raise UserError(
                f"rollouts {chunk.start} to {chunk.stop - 1} lost their actor {tries + 1} times; the last: {error}; "
                "if memory ran out, lower estimator.zeroth_order.chunk_size or cluster.rollout_actors"
            ) from error

    def _next_after(self, actor: ActorHandle) -> ActorHandle:
        place = self.actors.index(actor) if actor in self.actors else -1
        return self.actors[(place + 1) % len(self.actors)]
