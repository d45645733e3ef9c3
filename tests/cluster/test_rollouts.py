"""The pool against actors that die, fail, or take their turns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

from rlr_ray.cluster.rollouts import RolloutPool, _check
from rlr_ray.core.gradient import RolloutResult
from rlr_ray.core.plan import PlanShape
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.core.zeroth_order import Directions
from rlr_ray.engine import RolloutRequest
from rlr_ray.errors import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
REQUEST = RolloutRequest(0, PlanShape(4, 0, 0).draw(0), torch.arange(3.0), Directions(3, 0.1))
CHUNKS = [range(first, first + 2) for first in range(0, 12, 2)]


class Actor:
    """Answers with the indices; dies once at `dies_at` (always without a note), fails at `fails_at`."""

    def __init__(self, dies_at: int = -1, note: str | None = None, fails_at: int = -1):
        self.dies_at, self.note, self.fails_at = dies_at, note, fails_at

    def checksum(self) -> float:
        return generator_checksum()

    def run(self, request: RolloutRequest, indices: range) -> RolloutResult:
        if self.dies_at in indices and not (self.note and Path(self.note).exists()):
            if self.note:
                Path(self.note).touch()
            os._exit(1)
        if self.fails_at in indices:
            raise UserError("the reward is not finite")
        rewards = torch.tensor([float(index) for index in indices])
        return RolloutResult(indices, rewards + request.theta.sum(), -rewards)


def pool_of(count: int, max_retries: int = 4, **options: Any) -> RolloutPool:
    actor = ray.remote(Actor).options(num_cpus=0.1, max_restarts=-1)
    return RolloutPool([actor.remote(**options) for _ in range(count)], max_retries)


def collect(pool: RolloutPool) -> list[RolloutResult]:
    return sorted(pool(REQUEST, CHUNKS), key=lambda result: result.indices.start)


def test_every_chunk_comes_back_once() -> None:
    results = collect(pool_of(3))
    assert [result.indices for result in results] == CHUNKS
    assert torch.cat([result.rewards_plus for result in results]).tolist() == [3.0 + index for index in range(12)]


def test_the_chunks_of_an_actor_that_dies_come_back_all_the_same(tmp_path: Path) -> None:
    results = collect(pool_of(2, dies_at=5, note=str(tmp_path / "died")))
    assert (tmp_path / "died").exists()
    assert [result.indices for result in results] == CHUNKS


def test_a_chunk_that_always_kills_its_actor_ends_with_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"rollouts 4 to 5 lost their actor 3 times.*chunk_size"):
        collect(pool_of(2, max_retries=2, dies_at=5))


def test_a_rollout_that_fails_is_not_tried_again() -> None:
    with pytest.raises(UserError, match="the reward is not finite"):
        collect(pool_of(2, fails_at=3))


def test_actors_that_will_not_come_back_end_the_update() -> None:
    pool = pool_of(2)
    for actor in pool.actors:
        ray.kill(actor)  # no restart
    with pytest.raises(ActorDiedError):
        collect(pool)


def test_one_actor_that_will_not_come_back_leaves_its_work_to_the_other() -> None:
    pool = pool_of(2)
    ray.kill(pool.actors[0])
    assert [result.indices for result in collect(pool)] == CHUNKS


def test_an_actor_that_draws_other_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="draws other random numbers"):
        _check(generator_checksum() + 1)
