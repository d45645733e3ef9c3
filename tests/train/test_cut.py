"""A run with everything on that is cut and resumed ends as an uninterrupted one: what a checkpoint holds matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlr_ray.train.checkpoints import steps_in
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import outcome, small_run

JUDGES = {"fours": {"name": "digits_judge"}, "own": {"name": "digits"}}
EVERYTHING: dict[str, Any] = {
    "sampler": {"steps": 8},
    "estimator": {"sub_chain": {"length": 1, "place": "importance"}},
    "train": {"iterations": 7, "checkpoint_every": 2, "keep_checkpoints": 9, "learning_rate": 0.3},
    "guards": {"ema": 0.7, "keep": "best", "patience": 50},
    "evaluation": {"every": 1, "judge": None, "judges": JUDGES},
}
CUT = 5  # updates, of which the last is lost


def run(folder: Path, *, stop_after: int | None = None) -> Path:
    """Train, from a checkpoint if there is one; returns the run's folder."""
    config = small_run(folder, **EVERYTHING)

    def report(row: dict[str, Any]) -> None:
        if row["step"] + 1 == stop_after:
            raise KeyboardInterrupt

    engine, run_folder = Engine(config), RunFolder(config)
    run_folder.begin(resume=run_folder.path.exists())
    train(engine, engine.local_rollouts, report)
    return run_folder.path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole"))


def test_cut_and_resumed_it_ends_the_same(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=CUT)
    assert outcome(run(tmp_path)) == outcome(whole)


def test_checkpoints_are_saved_when_they_are_due_and_at_the_end(whole: Path) -> None:
    assert steps_in(whole / "checkpoints") == [2, 4, 6, 7]
