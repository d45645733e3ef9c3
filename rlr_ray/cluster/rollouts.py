"""Actors that run what needs no gradient, how a worker asks them, and waiting for actors to start."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from torch import Tensor

from rlr_ray.cluster.dispatch import Dispatcher
from rlr_ray.cluster.jobs import Fate, Patience, RolloutWorker
from rlr_ray.cluster.resources import enter
from rlr_ray.cluster.seats import Seat
from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine, RemoteRewards, Request, Result, RolloutBatch
from rlr_ray.utils.environment import prepare_process


class RolloutActor:
    """Holds an engine and nothing that a restart would lose."""

    def __init__(
        self, config: RunConfig, folder: str, checksum: float, remote: RemoteRewards, seat: Seat | None = None
    ):
        self.config, self.folder, self.checksum, self.remote = config, folder, checksum, remote
        self.crash = seat.take() if seat else None

    @functools.cached_property
    def engine(self) -> Engine:
        enter(self.folder)
        prepare_process(self.config.threads)
        check_generator(self.checksum)
        return Engine(self.config, self.remote)

    def ready(self) -> None:
        """Build the engine. Raises UserError if it cannot, or if random numbers are not the trainer's.

        Raises RewardCrashed if that is why the process before this one ended.
        """
        if self.crash:
            raise self.crash
        _ = self.engine

    def run(self, request: Request, theta: Tensor, chunks: Sequence[range]) -> list[Any]:
        """The results of a request whose theta comes apart from it: it is sent once for all of an update's."""
        asked = replace(request, theta=theta)
        return [replace(asked.run(self.engine, chunk), reward_s=0.0) for chunk in chunks]  # beside the update


def check_generator(checksum: float) -> None:
    """Raise UserError if this process draws other random numbers than the one that has this checksum."""
    if checksum != generator_checksum():
        raise UserError(
            f"a rollout actor draws other random numbers than the trainer (checksum {generator_checksum()}, not "
            f"{checksum}); install the same torch version on every node"
        )


class ActorWorker:
    """A rollout actor as the dispatcher sees it."""

    def __init__(self, name: str, actor: ActorHandle):
        self.name, self.actor = name, actor

    def ready(self) -> Future[None]:
        return actor_future(self.actor.ready.remote())

    def run(self, request: Any, chunks: Sequence[range]) -> Future[list[Any]]:
        return actor_future(self.actor.run.remote(*request, chunks))

    def end(self) -> None:
        ray.kill(self.actor, no_restart=False)  # Ray starts it again

    def fate(self, error: BaseException) -> Fate:
        if isinstance(error, ActorDiedError | ActorUnschedulableError):  # the latter: its node is no more
            return "gone"
        return "lost" if isinstance(error, RayActorError | OutOfMemoryError | RuntimeEnvSetupError) else "failed"


def actor_future(call: ray.ObjectRef) -> Future[Any]:
    """A call's future, in which a user's error is itself instead of Ray's wrapping of it."""
    unwrapped: Future[Any] = Future()

    def done(future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            unwrapped.set_result(future.result())
        else:
            cause = error.cause if isinstance(error, RayTaskError) else None
            unwrapped.set_exception(cause if isinstance(cause, UserError) else error)

    call.future().add_done_callback(done)
    return unwrapped


class RolloutPool:
    """Work on actors that may change at any time, while the caller goes on.

    Made in the driver and sent to the workers, where it is used.
    """

    def __init__(self, coordinator: ActorHandle, patience: Patience, seed: int):
        self.coordinator, self.patience, self.seed = coordinator, patience, seed
        self.known = 0  # version of the actors; 0: none yet
        self.here: Callable[[Request, range], Result] | None = None
        self.sent: tuple[Tensor, ray.ObjectRef] | None = None  # the last theta

    def share(self, workers: int, here: Callable[[Request, range], Result] | None) -> None:
        """Note that so many workers ask the same actors, and how this one runs a chunk that none is free for."""
        self.patience, self.here = replace(self.patience, timeout_s=workers * self.patience.timeout_s), here

    def __call__(self, request: Request, chunks: Sequence[range]) -> RolloutBatch:
        def name(chunk: range) -> str:
            return f"{request.name(chunk)} (seed {self.seed})"

        if self.sent is None or self.sent[0] is not request.theta:
            self.sent = request.theta, ray.put(request.theta)  # once, for any number of requests and actors
        asked = ray.put(replace(request, theta=torch.empty(0))), self.sent[1]
        here = functools.partial(self.here, request) if self.here else None
        kind = type(request).__name__
        job = self._dispatcher.submit(asked, chunks, name, kind=kind, partial=request.partial, here=here)
        return RolloutBatch(job, job.counts, job.cancel)

    def close(self) -> None:
        """Hand out nothing more, where it was used."""
        if "_dispatcher" in vars(self):
            self._dispatcher.close()

    @functools.cached_property
    def _dispatcher(self) -> Dispatcher:
        return Dispatcher(self._look, self.patience)

    def _look(self) -> Future[Sequence[RolloutWorker] | None]:
        """Who is there, if that has changed."""
        workers: Future[Sequence[RolloutWorker] | None] = Future()

        def answered(future: Future[Any]) -> None:
            if future.exception() or future.result() is None:
                workers.set_result(None)
                return
            version, (actors,) = future.result()
            actors.future().add_done_callback(lambda done: unpacked(version, done))

        def unpacked(version: int, future: Future[Any]) -> None:
            if future.exception():  # asked again at the next look
                workers.set_result(None)
                return
            self.known = version
            workers.set_result([ActorWorker(*entry) for entry in future.result().items()])

        self.coordinator.actors_since.remote(self.known).future().add_done_callback(answered)
        return workers


_RETURN_S = 3.0  # until an actor that died is asked again


def await_ready(ready: Mapping[str, Callable[[], ray.ObjectRef]], tries: int, remedy: str) -> None:
    """Wait for all of them, each by what it is called; one that dies, Ray starts again.

    Raises UserError if one cannot start, or died `tries` times; `remedy` is what may help then.
    """
    calls = {name: ask() for name, ask in ready.items()}  # all at once
    for name, call in calls.items():
        for _ in range(tries):
            try:
                ray.get(call)
                break
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise UserError(f"{name} cannot start: {error}") from error
            except RuntimeEnvSetupError as error:
                raise UserError(f"{name} cannot start in its environment: {error}") from error
            except (RayActorError, OutOfMemoryError):  # the latter: Ray ended it, for its node had no memory left
                time.sleep(_RETURN_S)
                call = ready[name]()
        else:
            raise UserError(f"{name} died {tries} times while it started; {remedy}")
