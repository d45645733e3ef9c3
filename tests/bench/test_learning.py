"""The problems' recipes load as they are, and what is read off a run is what it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.common import append_row
from bench.pages.learning import gain_at
from bench.problems.problem import problems
from bench.runs.learning import config_of, cost_of, costs, jobs_of, load, missing


@pytest.mark.parametrize("name", list(load()["sets"]))
def test_every_run_of_a_set_has_a_recipe_that_loads(name: str, tmp_path: Path) -> None:
    jobs = jobs_of(name)
    assert len({str(job) for job in jobs}) == len(jobs)
    for job in (job for job in jobs if not job["seed"]):
        config = config_of(job, 80, 10, str(tmp_path))
        assert config.train.iterations == 80 and config.cluster == "none"
        assert job["chains"] in (None, config.train.chains)
        assert job["rate"] in (None, config.train.learning_rate)


def test_a_problem_states_no_plan() -> None:
    assert len(problems()) == 10
    for problem in problems().values():
        assert not {"estimator", "train", "guards"} & problem.recipe.keys()


def test_a_cost_is_read_between_the_points() -> None:
    points = [[4000, 0.5, 0.7], [8000, 1.5, 0.9], [12000, 1.0, 0.8]]
    assert cost_of(points, 1.0) == 6000
    assert cost_of(points, 2.0) is None
    row = {"points": points}
    assert gain_at(row, 2000) == 0.25
    assert gain_at(row, 10000) == 1.25
    assert gain_at(row, 13000) == 1.0  # within a tenth of the end
    assert gain_at(row, 24000) is None


def test_a_backward_counts_as_two() -> None:
    rows = [{"denoiser_forwards": 100, "denoiser_backwards": 100}, {"denoiser_forwards": 190, "denoiser_backwards": 0}]
    assert costs(rows) == [300, 490]


def test_a_run_without_a_row_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.runs.learning.ROWS", tmp_path / "learning.jsonl")
    jobs = jobs_of("digits", seeds=1)
    append_row(tmp_path / "learning.jsonl", jobs[0] | {"gain": 1.0})
    assert missing(jobs) == jobs[1:]
