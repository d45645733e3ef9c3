"""The pool against real actors that die, fail, or are replaced. They are light: none imports more than torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

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
STARTED: list[Any] = []


def actor_class() -> Any:
    """Within a function, so that Ray pickles it by value and its processes import nothing of this module."""

    class Actor:
        """Answers with the indices; dies once at `dies_at` (always without a note), fails at `fails_at`."""

        def __init__(self, dies_at: int = -1, note: Any = None, fails_at: int = -1, error: Exception | None = None):
            self.dies_at, self.note, self.fails_at, self.error = dies_at, note, fails_at, error

        def ready(self) -> None:
            pass

        def run(self, request: Any, theta: Any, chunks: Any) -> Any:
            import os

            for indices in chunks:
                if self.dies_at in indices and not (self.note and self.note.exists()):
                    if self.note:
                        self.note.touch()
                    os._exit(1)
                if self.fails_at in indices and self.error:
                    raise self.error
            total = float(theta.sum())
            return [SimpleNamespace(indices=one, rewards_plus=[total + index for index in one]) for one in chunks]

    return Actor


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """End what a test has started: idle processes of Ray are not free."""
    yield
    while STARTED:
        one = STARTED.pop()
        one.close() if isinstance(one, RolloutPool) else ray.kill(one)


def actors_of(count: int, first: int = 0, **options: Any) -> dict[str, Any]:
    actor = ray.remote(actor_class()).options(num_cpus=0.1, max_restarts=-1)
    actors = {f"actor-{first + number}": actor.remote(**options) for number in range(count)}
    STARTED.extend(actors.values())
    return actors


def pool_of(actors: dict[str, Any], max_retries: int = 4) -> RolloutPool:
    coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote()
    ray.get(coordinator.set_actors.remote([ray.put(actors)]))
    pool = RolloutPool(coordinator, Patience(max_retries=max_retries), seed=7)
    STARTED.extend([coordinator, pool])
    return pool


def collect(pool: RolloutPool) -> list[Any]:
    return sorted(pool(REQUEST, CHUNKS).results, key=lambda result: result.indices.start)


def test_every_chunk_comes_back_once() -> None:
    results = collect(pool_of(actors_of(3)))
    assert [result.indices for result in results] == CHUNKS
    assert [reward for result in results for reward in result.rewards_plus] == [3 + index for index in range(12)]


def test_the_chunks_of_an_actor_that_dies_come_back_all_the_same(tmp_path: Path) -> None:
    results = collect(pool_of(actors_of(2, dies_at=5, note=tmp_path / "died")))
    assert (tmp_path / "died").exists()
    assert [result.indices for result in results] == CHUNKS


def test_a_chunk_that_always_kills_its_actor_ends_with_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"pairs 4 to 5 of update 3 \(seed 7\) went wrong 3 times.*\n.*chunk_size"):
        collect(pool_of(actors_of(2, dies_at=5), max_retries=2))


def test_a_users_error_in_a_rollout_ends_with_its_words() -> None:
    with pytest.raises(UserError, match=r"^the reward is not finite$"):
        collect(pool_of(actors_of(2, fails_at=3, error=UserError("the reward is not finite"))))


def test_a_rollout_that_always_fails_ends_with_its_traceback_and_seed() -> None:
    pool = pool_of(actors_of(2, fails_at=3, error=RuntimeError("an odd pixel")), max_retries=1)
    with pytest.raises(UserError, match=r"(?s)pairs 2 to 3 of update 3 \(seed 7\).*an odd pixel") as caught:
        collect(pool)
    assert "in run" in str(caught.value)


def test_an_actor_that_will_not_come_back_is_replaced_by_a_new_one() -> None:
    actors = actors_of(1)
    pool = pool_of(actors)
    assert [result.indices for result in collect(pool)] == CHUNKS
    ray.kill(actors["actor-0"])  # no restart
    batch = pool(REQUEST, CHUNKS)
    ray.get(pool.coordinator.set_actors.remote([ray.put(actors_of(1, first=1))]))
    assert sorted(result.indices.start for result in batch.results) == [chunk.start for chunk in CHUNKS]


def test_an_actor_that_draws_other_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="draws other random numbers"):
        check_generator(generator_checksum() + 1)
