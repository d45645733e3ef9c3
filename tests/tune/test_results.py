"""What a search writes, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from rlr_ray.cli import main
from rlr_ray.cli.tune import _begin
from rlr_ray.config.recipe import load_config
from rlr_ray.config.tune import TuneConfig, load_tune_config
from rlr_ray.errors import UserError
from rlr_ray.train.run_folder import RunFolder, locked
from rlr_ray.tune.report import write_report
from rlr_ray.tune.results import best_rows, filtered_row, write_results
from rlr_ray.tune.search import Progress, make_private, scheduler_of
from tests.config.test_tune import written
from tests.runs import small_run, train_here

K = "estimator.first_order.steps"


def searched(folder: Path, **changes: Any) -> TuneConfig:
    space = {K: {"choice": [1, 3, "all"]}, "train.max_grad_norm": {"choice": [None, 1.0]}}
    config = load_tune_config(written(folder, space=space, output_dir=str(folder), **changes), [])
    return config


def row(folder: Path, name: str, reward: float | None, peak: float | None, status: str, **point: Any) -> dict[str, Any]:
    found = {"trial": name, "budget_gib": 1.0, "status": status, "feasible": status != "over budget", "why": ""}
    found |= {"reward": reward, "reward_se": 0.1, "gain": reward, "gain_se": 0.1, "judge_after": None, "updates": 4}
    found |= {"cost": 9.0, "evaluation": 4, "theta_sha256": "a", "peak_gib": peak, "predicted_gib": 0.1, "seconds": 1.0}
    run = small_run(folder).model_dump(mode="json")
    return found | {"run": run, "point": {K: 1, "train.max_grad_norm": None} | point}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        row(folder, "low", 1.0, 0.5, "finished"),
        row(folder, "high", 2.0, 2.0, "finished", **{K: "all"}),
        row(folder, "cut", 3.0, 0.5, "stopped early", **{"train.max_grad_norm": 1.0}),
        row(folder, "large", None, 1.5, "over budget"),
        filtered_row(1.0, {"point": {K: 3, "train.max_grad_norm": None}, "predicted_gib": 3.0, "why": "needs 3 GiB"}),
    ]


def test_the_best_of_a_budget_fits_it_and_went_to_its_end(tmp_path: Path) -> None:
    config = searched(tmp_path, budgets_gib=[0.1, 1.0, 4.0])
    assert {budget: best["trial"] for budget, best in best_rows(config, rows(tmp_path)).items()} == {
        1.0: "low",
        4.0: "high",
    }


def test_choices_of_several_kinds_become_texts_and_all_is_written(tmp_path: Path) -> None:
    config = searched(tmp_path)
    config.folder.mkdir()
    for _ in range(2):  # the second time as a search that goes on
        (recipe,) = write_results(config, rows(tmp_path))
    assert len(list((config.folder / "tensorboard").glob("*/events*"))) == 3
    write_report(config, rows(tmp_path))
    table = pyarrow.parquet.read_table(config.folder / "results.parquet").to_pylist()
    assert [one[K] for one in table] == ["1", "all", "1", "1", "3"]
    assert [one["reward"] for one in table] == [1.0, 2.0, 3.0, None, None]
    assert load_config(str(recipe), []).memory_budget_gib == 1.0
    assert 'class="figure"' in (config.folder / "report.html").read_text()


def test_an_interrupted_search_ends_instead_of_going_on_with_the_next_budget(tmp_path: Path) -> None:
    progress = Progress(searched(tmp_path), 1.0)
    ended = [SimpleNamespace(status="TERMINATED"), SimpleNamespace(status="ERROR")]
    progress.on_experiment_end(ended)
    with pytest.raises(KeyboardInterrupt):
        progress.on_experiment_end([*ended, SimpleNamespace(status="RUNNING")])


def test_a_changed_recipe_is_no_search_to_resume(tmp_path: Path) -> None:
    config = searched(tmp_path)
    _begin(config, resume=False, overwrite=False)
    with pytest.raises(UserError, match="already holds a search"):
        _begin(config, resume=False, overwrite=False)
    _begin(config, resume=True, overwrite=False)
    base = yaml.safe_load(Path(config.base).read_text())
    Path(config.base).write_text(yaml.safe_dump(base | {"seed": 7}))
    with pytest.raises(UserError, match="begun with another base"):
        _begin(config, resume=True, overwrite=False)
    _begin(config, resume=False, overwrite=True)


def test_a_search_deletes_and_begins_in_nothing_but_its_own_folder(tmp_path: Path) -> None:
    """Neither a run's folder nor one that holds a search as its user wrote it, whatever the command says."""
    config = searched(tmp_path)
    run = RunFolder(small_run(tmp_path, name=config.name))
    run.begin(resume=False)
    for name in ("config.yaml", "tune.yaml"):
        before = (config.folder / name).read_text()
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises(UserError, match=f"holds no search, but .*{name}"):
                _begin(config, resume=resume, overwrite=overwrite)
        assert (config.folder / name).read_text() == before
        shutil.rmtree(config.folder)
        config.folder.mkdir()
        (config.folder / "tune.yaml").write_text((tmp_path / "search.yaml").read_text())


def test_a_run_begins_in_no_searchs_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = searched(tmp_path)
    _begin(config, resume=False, overwrite=False)
    recipe = ["train", "--config", config.base, "--set", f"output_dir={tmp_path}", "--set", f"name={config.name}"]
    for options in ([], ["--overwrite"], ["--resume-or-start"]):
        assert main([*recipe, *options]) == 2
        assert "holds no run, but tune.yaml" in capfd.readouterr().err
    assert [path.name for path in config.folder.iterdir()] == ["tune.yaml"]


def test_a_search_is_one_process_at_a_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = searched(tmp_path)
    monkeypatch.setattr("rlr_ray.cli.tune._run", lambda config: None)
    with locked(config.folder, "search"):
        assert main(["tune", "--config", str(tmp_path / "search.yaml")]) == 2
    assert "the search" in (said := capfd.readouterr().err) and "is held by process" in said
    assert not config.folder.exists()


def test_what_a_search_unpickles_lies_where_nobody_else_writes(tmp_path: Path) -> None:
    folder = tmp_path / "search" / "tune"
    make_private(folder)
    make_private(folder)  # as --resume does
    assert folder.stat().st_mode & 0o077 == 0
    for mode in (0o770, 0o702):
        folder.chmod(mode)
        with pytest.raises(UserError, match=r"may be written by others.*chmod -R go-w"):
            make_private(folder)


def test_a_trial_that_takes_over_another_keeps_its_folder(tmp_path: Path) -> None:
    space = {"train.learning_rate": {"uniform": [0.1, 0.2]}}
    population: Any = scheduler_of(load_tune_config(written(tmp_path, space=space, scheduler={"name": "pbt"}), []))

    def trial(name: str, rate: float, cost: int) -> Any:
        launch = {"run": {"name": name, "train": cost}, "point": {"train.learning_rate": rate}}
        return SimpleNamespace(config={"launch": launch})

    bad, good = trial("bad", 0.2, 1), trial("good", 0.1, 2)
    launch = population._get_new_config(bad, good)[0]["launch"]
    assert launch["run"] == {"name": "bad", "train": 2} and good.config["launch"]["run"]["name"] == "good"
    assert 0.1 <= launch["point"]["train.learning_rate"] <= 0.2


def test_a_run_goes_on_from_anothers_state_under_other_keys(tmp_path: Path) -> None:
    rates = {"good": 0.01, "bad": 10.0}
    runs = {name: train_here(small_run(tmp_path, name=name, train={"learning_rate": r})) for name, r in rates.items()}
    state = shutil.copytree(runs["good"].checkpoints.folder, tmp_path / "state")
    shutil.copy(runs["good"].path / "metrics.jsonl", state)
    config = small_run(tmp_path, name="bad", train={"learning_rate": 0.02, "iterations": 6})
    folder = RunFolder(config)
    (folder.path / "summary.json").unlink()  # its own run has not ended
    folder.checkpoints.adopt(state)
    folder.check(resume=True, overwrite=False)
    train_here(config, resume=True)
    lines = [
        [json.loads(line)["learning_rate"] for line in (run.path / "metrics.jsonl").open()] for run in runs.values()
    ]
    assert lines[1][:4] == lines[0] and 0 < max(lines[1][4:]) <= 0.02
