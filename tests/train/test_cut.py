"""A run with everything on that is cut and resumed ends as an uninterrupted one: what a checkpoint holds matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlr_ray.train.checkpoints import steps_in
from tests.runs import outcome, small_run, train_here

JUDGES = {"fours": {"name": "digits_judge"}, "own": {"name": "digits"}}
EVERYTHING: dict[str, Any] = {
    "sampler": {"steps": 8},
    "estimator": {"sub_chain": {"length": 1, "place": "importance"}},
    "train": {"iterations": 5, "checkpoint_every": 2, "keep_checkpoints": 9, "learning_rate": 0.3},
    "guards": {"ema": 0.7, "keep": "best", "patience": 50},
    "evaluation": {"every": 1, "judge": None, "judges": JUDGES},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(small_run(tmp_path_factory.mktemp("whole"), **EVERYTHING)).path


def test_cut_and_resumed_it_ends_the_same(tmp_path: Path, whole: Path) -> None:
    config = small_run(tmp_path, **EVERYTHING)
    with pytest.raises(KeyboardInterrupt):
        train_here(config, stop_after=3)  # the last update is lost
    assert outcome(train_here(config, resume=True).path) == outcome(whole)


def test_checkpoints_are_saved_when_they_are_due_and_at_the_end(whole: Path) -> None:
    assert steps_in(whole / "checkpoints") == [2, 4, 5]
