"""A trial that goes on from another one's state, as population based training has it."""

from __future__ import annotations

from pathlib import Path

import torch

from rlr_ray.checkpoints import Checkpoints
from rlr_ray.tune.apart import run_here
from rlr_ray.tune.trial import Trial
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
    assert found.keys() == expected.keys()
    assert (
        _plain({**found, "config": None}) == _plain({**expected, "config": None}) != _plain({**before, "config": None})
    )
    assert found["config"]["train"]["learning_rate"] == 5.0


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
