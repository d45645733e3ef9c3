"""Where a run's random numbers come from: its seed; and no update draws another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlr_ray.train.engine as engine_module
import rlr_ray.train.update as update_module
from rlr_ray.core.sampler import Chains
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import small_run


def test_every_update_has_chains_and_directions_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates of four chains and two pairs; noises, too, and none of the held-out chains'."""
    starts: list[Tensor] = []
    noises: list[Tensor] = []
    directions: list[Tensor] = []
    estimate, rollout = update_module.estimate_gradient, engine_module.rollout

    def seen(chains: Chains) -> None:
        starts.extend(chains.x_start)
        noises.extend(chains.noise.unbind(1))

    def watched_estimate(sampler: Any, theta: Tensor, work: Any, *rest: Any, **options: Any) -> Any:
        for _, chains in work.values():
            seen(chains)
        return estimate(sampler, theta, work, *rest, **options)

    def watched_rollout(sampler: Any, theta: Tensor, plan: Any, chains: Chains, u: Tensor, step_size: float) -> Any:
        directions.extend(u)
        return rollout(sampler, theta, plan, chains, u, step_size)

    monkeypatch.setattr(update_module, "estimate_gradient", watched_estimate)
    monkeypatch.setattr(engine_module, "rollout", watched_rollout)
    config = small_run(tmp_path, estimator={"zeroth_order": {"directions": "isotropic"}})
    engine = Engine(config)
    state = TrainState(engine.model.initial_theta, config.train, config.estimator)
    for _ in range(3):
        update(engine, state, None, Process())
    held_out = engine.start(*engine.held_out(range(2)))
    starts.extend(held_out[0])
    noises.extend(held_out[1].unbind(1))
    for drawn, count in ((starts, 3 * 4 + 2), (noises, 3 * 4 + 2), (directions, 3 * 2)):
        assert len(drawn) == count
        assert len({tuple(one.flatten().tolist()) for one in drawn}) == count
    assert all(torch.isfinite(one).all() for one in directions)


def test_what_is_drawn_follows_from_the_runs_seed(tmp_path: Path) -> None:
    engine, other = (Engine(small_run(tmp_path, seed=seed)) for seed in (0, 1))
    for drawn in (
        [one.train_chains(0, range(4)).x_start for one in (engine, other)],
        [one.start(*one.held_out(range(4)))[0] for one in (engine, other)],
    ):
        assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 8
    assert engine.direction_seeds(0, range(4)) != other.direction_seeds(0, range(4))
    chosen = Engine(small_run(tmp_path, seed=1, evaluation={"seed": 0}))
    assert chosen.held_out(range(4))[0] == engine.held_out(range(4))[0]


def test_updates_draw_their_plans_anew_and_take_prompts_in_turn(tmp_path: Path) -> None:
    one = Engine(
        small_run(tmp_path, prompts=["a handwritten one", "a handwritten two"], train={"chains_per_prompt": 4})
    )
    plans = [[str(one.plans(step)[0]) for step in range(8)] for _ in range(2)]
    assert plans[0] == plans[1] and len(set(plans[0])) > 1
    prompts = [one.train_chains(step, range(1)).conditioning["prompt"] for step in range(2)]
    assert not torch.equal(*prompts)
