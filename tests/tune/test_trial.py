"""A trial that goes on from another one's state, as population based training has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlr_ray.train.checkpoints import Checkpoints
from rlr_ray.tune.driver import run_here
from rlr_ray.tune.points import cost_of_update
from rlr_ray.tune.trial import Trial, run_trial
from tests.runs import small_run

CPU = torch.device("cpu")


def test_another_trials_state_replaces_its_own(tmp_path: Path) -> None:
    """All but the recipe: the weights, the optimizer's moments and the rows so far are the other's."""
    good, bad = small_run(tmp_path / "good"), small_run(tmp_path / "bad", train={"learning_rate": 5.0})
    for config in (good, bad):
        run_here(config, lambda row: None)
    theirs, own = Checkpoints(good), Checkpoints(bad)
    before = own.load_at(4, CPU)
    trial = object.__new__(Trial)  # as Ray Tune has it after `setup`, which needs Ray's folders
    trial.checkpoints = theirs
    trial.save_checkpoint(str(tmp_path / "copied"))
    trial.checkpoints = own
    trial.load_checkpoint(str(tmp_path / "copied"))
    found, expected = own.load_at(4, CPU), theirs.load_at(4, CPU)
    assert own.steps() == [4]
    assert (bad.folder / "metrics.jsonl").read_bytes() == (good.folder / "metrics.jsonl").read_bytes()
    assert found.keys() == expected.keys()
    assert (
        _plain({**found, "config": None}) == _plain({**expected, "config": None}) != _plain({**before, "config": None})
    )
    assert found["config"]["train"]["learning_rate"] == 5.0


def test_a_trial_that_a_guard_ends_has_cost_what_it_ran(tmp_path: Path) -> None:
    config = small_run(tmp_path, evaluation={"every": 1}, guards={"kl_stop": 1e-9})
    told: list[dict[str, Any]] = []
    run_trial(config, 4, told.append)
    assert [result["updates"] for result in told] == [1, 1] and config.train.iterations == 4
    assert told[-1]["done"] and told[-1]["cost"] == cost_of_update(config)


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
