"""The pool against real actors that die, fail, or are replaced. They are light: none imports more than torch."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from rlr_ray.cluster.coordinator import RunCoordinator
from rlr_ray.cluster.jobs import Patience
from rlr_ray.cluster.rollouts import RolloutPool, check_generator
from rlr_ray.core.plan import Plan
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.core.zeroth_order import Directions
from rlr_ray.errors import UserError
from rlr_ray.train.engine import RolloutRequest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
REQUEST = RolloutRequest(3, Plan(4, range(0), (), (0,)), torch.ones(3), Directions(3, 0.1))
CHUNKS = [range(first, first + 2) for first in range(0, 12, 2)]


def actor_class() -> Any:
    """Within a function, so that Ray pickles it by value and its processes import nothing of this module."""

    class Actor:
        """Answers with the indices; a file, which outlives it, may say that it dies at one, or fails with an error."""

        def __init__(self, wishes: Path):
            self.wishes = wishes

        def ready(self) -> None:
            pass

        def run(self, request: Any, theta: Any, chunks: Any) -> Any:
            import os

            wish = pickle.loads(self.wishes.read_bytes())
            for indices in chunks:
                if wish.get("dies_at") in indices:
                    if wish.get("once"):
                        self.wishes.write_bytes(pickle.dumps({}))
                    os._exit(1)
                if wish.get("fails_at") in indices:
                    raise wish["error"]
            total = float(theta.sum())
            return [SimpleNamespace(indices=one, rewards_plus=[total + index for index in one]) for one in chunks]

    return Actor


class Shared:
    """A coordinator and two actors, which all tests have: a process of Ray's takes seconds to start."""

    def __init__(self, folder: Path):
        self.wishes, self.started = folder / "wishes", list[Any]()
        self.coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote()
        self.started.append(self.coordinator)
        self.actors = {name: self.actor() for name in ("actor-0", "actor-1")}

    def actor(self) -> Any:
        actor = ray.remote(actor_class()).options(num_cpus=0.1, max_restarts=-1).remote(self.wishes)
        self.started.append(actor)
        return actor

    def tell(self, actors: dict[str, Any]) -> None:
        ray.get(self.coordinator.set_actors.remote([ray.put(actors)]))

    def await_actors(self) -> None:
        """Those that a test before has killed are back."""
        for actor in self.actors.values():
            for _ in range(300):
                try:
                    ray.get(actor.ready.remote())
                    break
                except RayActorError:
                    time.sleep(0.1)

    def pool(self, max_retries: int = 4, **wish: Any) -> RolloutPool:
        self.wishes.write_bytes(pickle.dumps(wish))
        return RolloutPool(self.coordinator, Patience(max_retries=max_retries), seed=7)


@pytest.fixture(scope="module")
def processes(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("wishes"))
    yield shared
    for one in shared.started:
        ray.kill(one)


@pytest.fixture
def shared(processes: Shared) -> Shared:
    processes.tell(processes.actors)
    processes.await_actors()
    return processes


def collect(pool: RolloutPool) -> list[Any]:
    try:
        return sorted(pool(REQUEST, CHUNKS).results, key=lambda result: result.indices.start)
    finally:
        pool.close()


def test_every_chunk_comes_back_once(shared: Shared) -> None:
    results = collect(shared.pool())
    assert [result.indices for result in results] == CHUNKS
    assert [reward for result in results for reward in result.rewards_plus] == [3 + index for index in range(12)]


def test_a_users_error_in_a_rollout_ends_with_its_words(shared: Shared) -> None:
    with pytest.raises(UserError, match=r"^the reward is not finite$"):
        collect(shared.pool(fails_at=3, error=UserError("the reward is not finite")))


def test_a_rollout_that_always_fails_ends_with_its_traceback_and_seed(shared: Shared) -> None:
    with pytest.raises(UserError, match=r"(?s)pairs 2 to 3 of update 3 \(seed 7\).*an odd pixel") as caught:
        collect(shared.pool(max_retries=1, fails_at=3, error=RuntimeError("an odd pixel")))
    assert "in run" in str(caught.value)


def test_the_chunks_of_an_actor_that_dies_come_back_all_the_same(shared: Shared) -> None:
    results = collect(shared.pool(dies_at=5, once=True))
    assert pickle.loads(shared.wishes.read_bytes()) == {}  # it has died
    assert [result.indices for result in results] == CHUNKS


def test_a_chunk_that_always_kills_its_actor_ends_with_an_error_that_names_it(shared: Shared) -> None:
    with pytest.raises(UserError, match=r"pairs 4 to 5 of update 3 \(seed 7\) went wrong 3 times.*\n.*chunk_size"):
        collect(shared.pool(max_retries=2, dies_at=5))


def test_an_actor_that_will_not_come_back_is_replaced_by_a_new_one(shared: Shared) -> None:
    first, pool = shared.actor(), shared.pool()
    shared.tell({"actor-2": first})
    try:
        assert sorted(result.indices.start for result in pool(REQUEST, CHUNKS).results) == [*range(0, 12, 2)]
        ray.kill(first)  # no restart
        batch = pool(REQUEST, CHUNKS)
        shared.tell({"actor-0": shared.actors["actor-0"]})
        assert sorted(result.indices.start for result in batch.results) == [*range(0, 12, 2)]
    finally:
        pool.close()


def test_an_actor_that_draws_other_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="draws other random numbers"):
        check_generator(generator_checksum() + 1)
