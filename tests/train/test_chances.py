"""Where a run's random numbers come from; tests/train/test_update.py holds that no update draws another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlr_ray.train.engine import Engine
from tests.runs import small_run

COUNT = 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_run(Path("nowhere")))


def distinct(rows: list[Tensor]) -> bool:
    return len(torch.cat(rows).flatten(1).unique(dim=0)) == sum(map(len, rows))


def test_what_is_drawn_follows_from_the_runs_seed(engine: Engine, tmp_path: Path) -> None:
    other = Engine(small_run(tmp_path, seed=1))
    assert distinct([one.train_chains(0, range(COUNT)).x_start for one in (engine, other)])
    assert distinct([one.start(*one.held_out(range(COUNT)))[0] for one in (engine, other)])
    assert engine.direction_seeds(0, range(COUNT)) != other.direction_seeds(0, range(COUNT))
    chosen = Engine(small_run(tmp_path, seed=1, evaluation={"seed": 0}))
    assert chosen.held_out(range(COUNT))[0] == engine.held_out(range(COUNT))[0]


def test_updates_draw_their_plans_anew_and_take_prompts_in_turn(tmp_path: Path) -> None:
    one = Engine(
        small_run(tmp_path, prompts=["a handwritten one", "a handwritten two"], train={"chains_per_prompt": 4})
    )
    plans = [[str(one.plans(step)[0]) for step in range(8)] for _ in range(2)]
    assert plans[0] == plans[1] and len(set(plans[0])) > 1
    prompts = [one.train_chains(step, range(1)).conditioning["prompt"] for step in range(2)]
    assert not torch.equal(*prompts)
