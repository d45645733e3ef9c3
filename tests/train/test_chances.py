"""Where a run's random numbers come from: nothing is drawn twice that must be drawn anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlr_ray.train.engine import Engine
from tests.runs import small_run

STEPS, COUNT = 3, 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_run(Path("nowhere")))


def distinct(rows: list[Tensor]) -> bool:
    return len(torch.cat(rows).flatten(1).unique(dim=0)) == sum(map(len, rows))


def test_all_chains_of_a_run_and_its_held_out_ones_differ(engine: Engine) -> None:
    """In their starts, and in every step's noise."""
    trained = [engine.train_chains(step, range(COUNT)) for step in range(STEPS)]
    seeds, prompts = engine.held_out(range(COUNT))
    start, noise, _ = engine.start(seeds, prompts)
    assert distinct([start, *(chains.x_start for chains in trained)])
    assert distinct([noise.flatten(0, 1), *(chains.noise.flatten(0, 1) for chains in trained)])


def test_all_directions_of_a_run_differ(engine: Engine) -> None:
    names = [engine.direction_seeds(step, range(COUNT)) for step in range(STEPS)]
    assert len({name for of_step in names for name in of_step}) == STEPS * COUNT


def test_what_is_drawn_follows_from_the_runs_seed(engine: Engine, tmp_path: Path) -> None:
    other = Engine(small_run(tmp_path, seed=1))
    assert distinct([one.train_chains(0, range(COUNT)).x_start for one in (engine, other)])
    assert distinct([one.start(*one.held_out(range(COUNT)))[0] for one in (engine, other)])
    assert engine.direction_seeds(0, range(COUNT)) != other.direction_seeds(0, range(COUNT))
    chosen = Engine(small_run(tmp_path, seed=1, evaluation={"seed": 0}))
    assert chosen.held_out(range(COUNT))[0] == engine.held_out(range(COUNT))[0]


def test_updates_draw_their_plans_and_prompts_anew(engine: Engine) -> None:
    plans = [str(engine.plans(step)[0]) for step in range(8)]
    assert len(set(plans)) > 1
    assert plans == [str(engine.plans(step)[0]) for step in range(8)]
