"""Searches on a local Ray: the best point found, what does not fit, what fails, and an interruption."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlr_ray.cli import main
from rlr_ray.config.estimator import merge
from rlr_ray.config.tune import TuneConfig, load_tune_config
from rlr_ray.lab.cost import Probe
from tests.cli.test_watch import get, served
from tests.config.test_tune import ROOT, written
from tests.leftovers import nothing_left
from tests.runs import RECIPE, SMALL
from tests.tune.test_points import MODEL, SECONDS

H, SCALE = "estimator.sub_chain.length", "estimator.zeroth_order.scale"
SPACE = {H: {"choice": [1, 2, 3]}, SCALE: {"loguniform": [0.001, 1.0]}}
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
long = pytest.mark.system  # minutes: `python -m pytest -m system tests/tune`


def searched(folder: Path, trial: Any, **changes: Any) -> tuple[TuneConfig, list[dict[str, Any]]]:
    """A search of such trials and its rows. No update is measured: a point needs what a step of its sub-chain takes."""
    from rlr_ray.tune.search import search

    keys: dict[str, Any] = {"output_dir": str(folder), "space": SPACE, "cpus": 0.5, "budgets_gib": [4.0]}
    config = load_tune_config(written(folder, **(keys | changes)), [])
    config.folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlr_ray.tune.search._measure", lambda *_: Probe(MODEL, SECONDS))
        with nothing_left():
            return config, search(config, trial)


def synthetic() -> Any:
    """A trial of four evaluations, best at h = 2 and scale = .03."""
    from ray import tune

    class Synthetic(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.point, self.evaluation = config["launch"]["point"], 0

        def step(self) -> dict[str, Any]:
            self.evaluation += 1
            top = -((self.point[H] - 2) ** 2) - (math.log10(self.point[SCALE]) - math.log10(0.03)) ** 2
            result = {"reward": top * (1 + 1 / self.evaluation), "reward_se": 0.1, "peak_gib": 0.01}
            counts = dict.fromkeys(("evaluation", "updates", "cost"), self.evaluation)
            return result | counts | {"done": self.evaluation == 4}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            (Path(checkpoint_dir) / "evaluation").write_text(str(self.evaluation))

        def load_checkpoint(self, checkpoint_dir: str) -> None:
            self.evaluation = int((Path(checkpoint_dir) / "evaluation").read_text())

    return Synthetic


def test_the_best_point_is_found_and_bad_ones_are_stopped_early(tmp_path: Path) -> None:
    from rlr_ray.tune.results import best_rows

    config, rows = searched(tmp_path, synthetic(), trials=16, scheduler={"name": "asha", "reduction_factor": 2})
    assert len(rows) == 16
    point = best_rows(config, rows)[4.0]["point"]
    assert point[H] == 2 and 0.01 < point[SCALE] < 0.1
    assert 4 <= sum(row["status"] == "stopped early" for row in rows) <= 14


def test_a_trial_that_dies_before_its_first_result_is_told(tmp_path: Path) -> None:
    class Dies(synthetic()):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            if self.point[H] == 1:
                raise RuntimeError("an odd point")

    space = {H: {"choice": [1, 2]}, SCALE: {"choice": [0.1]}}
    rows = {row["point"][H]: row for row in searched(tmp_path, Dies, space=space, searcher="grid", trials=2)[1]}
    assert rows[1]["status"] == "failed" and "an odd point" in rows[1]["why"]
    assert rows[2]["status"] == "finished"


@long
def test_nsga2_looks_at_memory_too(tmp_path: Path) -> None:
    _, rows = searched(tmp_path, synthetic(), trials=6, searcher="nsga2", scheduler={"name": "none"})
    assert [row["status"] for row in rows] == ["finished"] * 6


def real(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run `rlr-ray tune` on the embedded model; the rows of results.parquet."""
    keys = {
        "name": "searched",
        "output_dir": str(folder),
        "space": {H: {"choice": [1, 2]}},
        "searcher": "grid",
        "trials": 2,
        "evaluations": 2,
        "cost": {"denoiser_forwards": 300},
        "cpus": 0.5,
    }
    file = written(folder, merge(RECIPE, SMALL), **(keys | changes))
    with nothing_left():
        assert main(["tune", "--config", file]) == 0
    return pyarrow.parquet.read_table(folder / "searched" / "results.parquet").to_pylist()


REWARDS = """
import threading

from rlr_ray.rewards.digits import Digits


class Greedy(Digits):
    differentiable = True

    def forward(self, images, prompts, metadata):
        return super().forward(images + images.new_zeros(25_000_000).sum(), prompts, metadata)


class Odd(Digits):
    '''Goes well where a search measures it, which is in a main thread, and fails in a trial, which is in another.'''

    differentiable = True

    def forward(self, images, prompts, metadata):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("an odd pixel")
        return super().forward(images, prompts, metadata)
"""


@contextmanager
def followed(search: Path) -> Iterator[list[dict[str, str]]]:
    """Parts of the page of `rlr-ray watch`, each time that they are new, while the block goes on and once after it."""
    pages, ended = list[dict[str, str]](), threading.Event()

    def follow() -> None:
        while not search.is_dir() and not ended.wait(0.1):
            pass
        with served(str(search)) as port:
            mark, last = "", False
            while not last:
                last = ended.wait(1.0)
                status, text = get(port, f"/parts?mark={mark}")
                if status == 200:
                    answer = json.loads(text)
                    mark = answer["mark"]
                    pages.append(answer["parts"])

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield pages
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Any]], list[Any]]]:
    """A search of three rewards: a good one, one of 100 MB, and one that raises. Its folder, rows and live pages."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "some.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # as if all were alike, so that the greedy one is not left out, as it is otherwise
        patch.setattr("rlr_ray.tune.points._parts_of", lambda run: "all")
        names = ["digits", "some:Greedy", "some:Odd"]
        with followed(folder / "searched") as pages:
            rows = real(folder, space={"reward.name": {"choice": names}}, budgets_gib=[0.05], trials=3)
    yield folder, {row["reward.name"]: row for row in rows}, pages


@pytest.mark.slow
def test_the_best_recipe_trains_to_the_same_weights(results: Any, tmp_path: Path) -> None:
    folder, rows, _ = results
    good = rows["digits"]
    assert good["status"] == "finished" and good["peak_gib"] == pytest.approx(good["predicted_gib"], rel=0.05)
    recipe = folder / "searched" / "best.0.05.yaml"
    assert main(["train", "--config", str(recipe), "--set", f"output_dir={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "searched-best-0.05" / "summary.json").read_text())
    assert summary["theta_sha256"] == good["theta_sha256"] and summary["reward_after"] == good["reward"]


def test_a_trial_that_takes_more_than_predicted_is_over_its_budget(results: Any) -> None:
    row = results[1]["some:Greedy"]
    assert row["status"] == "over budget" and not row["feasible"] and 0.09 < row["peak_gib"] < 0.11
    assert row["predicted_gib"] < 0.05 and "memory_budget_gib is 0.05" in row["why"]


def test_a_trial_that_raises_is_told(results: Any) -> None:
    row = results[1]["some:Odd"]
    assert row["status"] == "failed" and "an odd pixel" in row["why"] and row["feasible"]


def test_pages_and_tensorboard_show_the_trials(results: Any) -> None:
    folder = results[0] / "searched"
    report, reward = (folder / "report.html").read_text(), results[1]["digits"]["reward"]
    figures = map(json.loads, re.findall(r'<script type="application/json">(.*?)</script>', report))
    assert next(figures)["data"][0]["y"] == pytest.approx([reward]) and "an odd pixel" in report
    (session,) = [path.parent for path in (folder / "tensorboard").glob("*/events*")]
    events = EventAccumulator(str(session)).Reload()
    assert events.Scalars("reward")[0].value == pytest.approx(reward)
    told = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"reward.name" in told and b"digits" in told


def test_a_search_is_followed_while_it_goes_on(results: Any) -> None:
    """None of its trials at first, then one on its way, and at last the finished one among the others."""
    pages, trial = results[2], results[1]["digits"]["trial"]
    assert "No run yet" in pages[0]["head"]
    assert any(re.search(r"Update \d|No update of", page["head"]) for page in pages[:-1])
    assert f'<a href="/?run={trial}">' in pages[-1]["links"] and "Finished after" in pages[-1]["head"]


@pytest.mark.slow
def test_a_reward_that_raises_at_once_is_never_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(REWARDS.replace("is not threading", "is threading"))
    monkeypatch.chdir(tmp_path)
    (row,) = real(tmp_path, space={"reward.name": {"choice": ["broken:Odd"]}})
    assert row["status"] == "filtered" and "an odd pixel" in row["why"] and "Traceback" not in row["why"]


@long
def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    """Killed -9 with its whole Ray after the first trial; trials that had ended are not run again."""
    (tmp_path / "search").mkdir()
    file = Path(
        written(
            tmp_path / "search",
            merge(RECIPE, SMALL),
            output_dir=str(tmp_path),
            space={H: {"choice": [1, 2]}},
            searcher="grid",
            scheduler={"name": "none"},
            trials=2,
            evaluations=2,
            concurrent=1,
            cost={"denoiser_forwards": 400},
        )
    )
    command = [sys.executable, "-m", "rlr_ray", "tune", "--config", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT)
    }
    with (tmp_path / "log.txt").open("ab") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        ended = lambda: (tmp_path / "log.txt").read_text().count("reward ")  # noqa: E731
        while not ended():
            assert first.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        before = {path.parent.name: path.stat().st_mtime for path in tmp_path.glob("searched/trials/*/summary.json")}
        second = subprocess.run([*command, "--resume"], env=environment, stdout=log, stderr=log)
    assert second.returncode == 0, (tmp_path / "log.txt").read_text()
    rows = pyarrow.parquet.read_table(tmp_path / "searched" / "results.parquet").to_pylist()
    assert sorted(row[H] for row in rows) == [1, 2] and {row["status"] for row in rows} == {"finished"}
    after = {path.parent.name: path.stat().st_mtime for path in tmp_path.glob("searched/trials/*/summary.json")}
    assert len(before) >= 1 and len(after) == 2
    first_done = min(before, key=lambda name: before[name])
    assert after[first_done] == before[first_done]
    assert yaml.safe_load((tmp_path / "searched" / "best.1.yaml").read_text())["memory_budget_gib"] == 1.0


@long
def test_trials_on_a_cluster_that_are_stopped_early_free_their_workers_and_actors(tmp_path: Path) -> None:
    """Two trials fit at once, each a TorchTrainer and a rollout actor; rates of 5 and 10 throw the weights away."""
    cluster = {"worker": {"cpus": 1.25}, "rollouts": {"cpus": 0.5, "min_actors": 1, "max_actors": 1}}
    rows = real(
        tmp_path,
        space={"train.learning_rate": {"choice": [0.01, 0.02, 5.0, 10.0]}},
        set={"cluster": cluster},
        trials=4,
        evaluations=3,
        cost={"denoiser_forwards": 600},
        scheduler={"name": "asha", "reduction_factor": 2},
    )
    found = {row["train.learning_rate"]: row for row in rows}
    assert [found[rate]["status"] for rate in (5.0, 10.0)] == ["stopped early"] * 2
    assert "finished" in (found[0.01]["status"], found[0.02]["status"])


@long
def test_a_population_goes_on_from_its_best(tmp_path: Path) -> None:
    """Of two learning rates the bad one's trial takes over the good one's state, and goes on in its own folder."""
    rows = real(
        tmp_path,
        space={"train.learning_rate": {"choice": [0.01, 10.0]}},
        trials=2,
        evaluations=4,
        cost={"denoiser_forwards": 800},
        scheduler={"name": "pbt"},
    )
    assert [row["status"] for row in rows] == ["finished"] * 2
    assert any((tmp_path / "searched" / "tune" / "1").glob("pbt_policy_*"))  # Ray Tune's record of who took over whom
    assert len({row["trial"] for row in rows}) == 2
    metrics = [tmp_path / "searched" / "trials" / row["trial"] / "metrics.jsonl" for row in rows]
    first, second = (json.loads(file.read_text().splitlines()[0])["learning_rate"] for file in metrics)
    assert first == second < 0.1  # whatever rate the one that took over went on with
