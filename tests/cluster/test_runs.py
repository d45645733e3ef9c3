"""Whole runs on Ray end with the same weights as in this process, also when processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from rlr_ray.cluster.launch import run_on_ray
from rlr_ray.config.recipe import load_config
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import RECIPE, logged, short_run, small_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
ROOT = Path(__file__).parents[2]
CLUSTER: dict[str, Any] = {"worker": {"cpus": 0.5}, "rollouts": {"cpus": 0.25}}
ONE_TERM: dict[str, Any] = {"first_order": {"steps": "all"}, "sub_chain": {"length": 0}}


def ignore(row: dict[str, Any]) -> None:
    pass


def summary_on_ray(config: RunConfig, report: Callable[[dict[str, Any]], None] = ignore) -> dict[str, Any]:
    assert config.cluster != "none"
    run_on_ray(config, config.cluster, report, lambda: RunFolder(config).begin(resume=False))
    return RunFolder(config).load_summary()


def summary_here(config: RunConfig) -> dict[str, Any]:
    RunFolder(config).begin(resume=False)
    engine = Engine(config)
    train(engine, None, ignore)
    return RunFolder(config).load_summary()


SLOW_DIGITS = """
import time
from rlr_ray.rewards.digits import Digits

class Reward(Digits):
    def forward(self, images, prompts, metadata):
        time.sleep(0.2)
        return super().forward(images, prompts, metadata)
"""


def test_workers_that_come_and_actors_that_die_end_with_the_local_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reward and prompts of the driver's folder, and a surrogate that actors take off the reward."""
    monkeypatch.chdir(tmp_path)
    Path("slow_digits.py").write_text(SLOW_DIGITS)  # an update's rollouts take 0.8 s, so the kill falls among them
    Path("my_prompts.txt").write_text("a handwritten three\na handwritten eight\n")
    estimator = ONE_TERM | {
        "surrogate": {"use": "residual", "name": "digits", "coefficient": 0.7},
        "rest": "zeroth_order",
    }
    keys: dict[str, Any] = {
        "reward": {"name": "slow_digits:Reward"},
        "prompts": "my_prompts.txt",
        "estimator": estimator | {"zeroth_order": {"count": 8}},
    }
    rows: list[dict[str, Any]] = []
    killed: list[int] = []

    def kill_one(row: dict[str, Any]) -> None:
        rows.append(row)
        if not killed:
            assert row["step"] < 2
            actors = [child for child in psutil.Process().children(recursive=True) if _is_actor(child)]
            assert len(actors) == 2
            actors[0].send_signal(signal.SIGKILL)
            killed.append(actors[0].pid)

    cluster = CLUSTER | {"workers": {"min": 1, "max": 2}, "rollouts": {"cpus": 0.25, "min_actors": 2}}
    with logged() as said:
        found = summary_on_ray(small_run(tmp_path, name="on-ray", cluster=cluster, **keys), kill_one)
    expected = summary_here(small_run(tmp_path, name="here", **keys))
    assert killed and not psutil.pid_exists(killed[0])
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert "a TorchTrainer of 1 to 2 worker(s) and 2 to 2 rollout actors" in found["ran_on"]
    assert "training on 2 workers" in said  # elastic ones had room for both
    for name in ("theta_sha256", "gain", "scores"):
        assert found[name] == expected[name]


FORWARD: dict[str, Any] = {"preset": "awm", "half_order": {"draws": 1}}
BRANCHES: dict[str, Any] = {"preset": "branches", "half_order": {"branch_steps": 2}}
RLR: dict[str, Any] = {"preset": "rlr", "zeroth_order": {"count": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "ahead"),
    [(FORWARD, 0), (BRANCHES, 0), (RLR, 1)],
    ids=["forward", "branches", "all orders, an update ahead"],
)
def test_chains_of_actors_that_die_and_of_two_workers_end_with_the_local_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: dict[str, Any], ahead: int
) -> None:
    """Also what evaluations measure. Both actors are killed, so for a while the workers sample by themselves."""
    monkeypatch.chdir(tmp_path)
    Path("slow_digits.py").write_text(SLOW_DIGITS)
    reward = {"name": "slow_digits:Reward", "differentiable": True}
    keys: dict[str, Any] = {"reward": reward, "evaluation": {"every": 2}}
    base = small_run(tmp_path, name="here", train={"ahead": ahead}, **keys)
    config = RunConfig.model_validate(base.model_dump() | {"estimator": estimator})
    killed: list[int] = []
    rows: list[dict[str, Any]] = []

    def kill_all(row: dict[str, Any]) -> None:
        rows.append(row)
        if not killed:
            for child in filter(_is_actor, psutil.Process().children(recursive=True)):
                child.send_signal(signal.SIGKILL)
                killed.append(child.pid)

    cluster = CLUSTER | {"workers": 2, "rollouts": {"cpus": 0.25, "min_actors": 2}}
    found = summary_on_ray(
        RunConfig.model_validate(config.model_dump() | {"name": "on-ray", "cluster": cluster}), kill_all
    )
    expected = summary_here(config)
    assert len(killed) == 2 and any(row["actor_forwards"] for row in rows)
    assert any(
        row["rollouts_rerun"] or row["rollouts_here"] for row in rows
    )  # what they left undone, or had no time for
    for name in ("theta_sha256", "gain", "scores", "kl", "diversity_after"):
        assert found[name] == expected[name]


def _is_actor(process: psutil.Process) -> bool:
    return "RolloutActor" in " ".join(process.cmdline())


@pytest.mark.slow
def test_a_surrogate_that_two_workers_learn_ends_with_the_local_weights(tmp_path: Path) -> None:
    """The run waits for no actor: there is room for one only once the workers have theirs."""
    surrogate = {"use": "residual", "name": "online", "coefficient": 0.7, "steps_per_update": 5}
    keys: dict[str, Any] = {"estimator": ONE_TERM | {"surrogate": surrogate, "rest": "half_order"}}
    cluster = CLUSTER | {"workers": 2, "rollouts": {"cpus": 0.25, "min_actors": 0, "max_actors": 1}}
    found = summary_on_ray(small_run(tmp_path, name="on-ray", cluster=cluster, **keys))
    assert found["theta_sha256"] == summary_here(small_run(tmp_path, name="here", **keys))["theta_sha256"]


@pytest.mark.slow
def test_an_error_in_one_of_two_workers_ends_the_run_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_reward_of_rank_0.py").write_text(
        "import torch.distributed as group\n"
        "def broken(images, prompts, metadata):\n"
        "    zero = group.is_initialized() and group.get_rank() == 0\n"
        "    return images.mean((1, 2, 3)) / (0 if zero else 1)\n"
        "broken.differentiable = True\n"
    )
    keys: dict[str, Any] = {"reward": {"name": "my_reward_of_rank_0:broken"}, "estimator": {"rest": "half_order"}}
    with pytest.raises(UserError, match="my_reward_of_rank_0:broken' returned inf"):
        summary_on_ray(small_run(tmp_path, cluster=CLUSTER | {"workers": 2}, **keys))


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """So --overwrite has deleted nothing. There are no rollout actors, which would find it out first."""
    nowhere = {"name": "stable_diffusion", "path": "./nowhere"}
    config = small_run(tmp_path, cluster=CLUSTER, model=nowhere, estimator=ONE_TERM)
    with pytest.raises(UserError, match="there is no such folder"):
        summary_on_ray(config)
    assert not config.folder.exists()


@pytest.mark.slow
def test_a_killed_driver_resumes_to_the_same_weights(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "runs"), "cluster": CLUSTER}))
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(recipe)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    config = load_config(str(recipe), [])
    while not (config.folder / "checkpoints" / "update_000001.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = RunFolder(config)
    assert not folder.holds_results and config.cluster != "none"
    folder.check(resume=True, overwrite=False)
    with logged() as said:
        run_on_ray(config, config.cluster, ignore, lambda: folder.begin(resume=True))
    assert any("going on from update" in text for text in said)
    assert folder.load_summary()["theta_sha256"] == summary_here(short_run(tmp_path, name="here"))["theta_sha256"]
