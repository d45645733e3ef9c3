"""Whole runs on Ray end with the same weights as in this process, also when processes are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlr_ray.cluster.launch import run_on_ray
from rlr_ray.config.estimator import merge
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import RECIPE, logged, short_run

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
Report = Callable[[dict[str, Any]], None]


SMALL: dict[str, Any] = {"worker": {"cpus": 0.5}, "rollouts": {"cpus": 0.25}}


def ignore(row: dict[str, Any]) -> None:
    pass


def cluster_run(
    folder: Path,
    report: Report = ignore,
    changes: dict[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Run on Ray and return the summary."""
    cluster = merge(SMALL, keys)
    name = "-".join(re.findall(r"\w+", str(keys)))
    config = short_run(folder, name=name, cluster=cluster, **changes or {})
    assert config.cluster != "none"
    run_on_ray(config, config.cluster, report, lambda: RunFolder(config).begin(resume=False))
    return RunFolder(config).load_summary()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("keys", "workers", "actors"),
    [({"rollouts": {"max_actors": 1}}, "1", "1 to 1"), ({"workers": {"min": 1, "max": 2}}, "1 to 2", "1 to 2")],
    ids=str,
)
def test_any_number_of_actors_and_workers_ends_with_the_local_weights(
    tmp_path: Path, local: dict[str, Any], keys: dict[str, Any], workers: str, actors: str
) -> None:
    rows: list[dict[str, Any]] = []
    with logged() as said:
        summary = cluster_run(tmp_path, rows.append, **keys)
    assert summary["theta_sha256"] == local["theta_sha256"]
    assert summary["gain"] == local["gain"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert f"a TorchTrainer of {workers} worker(s) and {actors} rollout actors" in summary["ran_on"]
    assert f"training on {workers[-1]} worker{'s' * (workers[-1] == '2')}" in said  # elastic ones found room for both


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ["online", "digits"])
def test_a_surrogate_is_the_same_on_a_cluster(tmp_path: Path, name: str) -> None:
    """Learned by two workers alike; or a named one, of which the actors are told how much to take off the reward."""
    surrogate = {"name": name, "coefficient": 0.7, "steps_per_update": 5}
    estimator = {"first_order_steps": "all", "sub_chain": {"length": 0}, "surrogate": surrogate}
    changes = {"estimator": estimator | {"rest": "half_order" if name == "online" else "zeroth_order"}}
    config = short_run(tmp_path, name="local", **changes)
    RunFolder(config).begin(resume=False)
    engine = Engine(config)
    train(engine, engine.local_rollouts, ignore)
    summary = cluster_run(tmp_path, changes=changes, workers=2)
    assert summary["theta_sha256"] == RunFolder(config).load_summary()["theta_sha256"]


SLOW_DIGITS = """
import time
from rlr_ray.rewards.digits import Digits

class Reward(Digits):
    def forward(self, images, prompts, metadata):
        time.sleep(0.2)
        return super().forward(images, prompts, metadata)
"""


@pytest.mark.usefixtures("cluster")
def test_a_killed_rollout_actor_changes_nothing(
    tmp_path: Path, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slow_digits.py").write_text(SLOW_DIGITS)  # an update's rollouts take 0.8 s, so the kill falls among them
    killed: list[int] = []

    def kill_one(row: dict[str, Any]) -> None:
        if not killed:
            assert row["step"] < 2
            actors = [child for child in psutil.Process().children(recursive=True) if _is_actor(child)]
            assert len(actors) == 2
            actors[0].send_signal(signal.SIGKILL)
            killed.append(actors[0].pid)

    summary = cluster_run(tmp_path, kill_one, {"reward": {"name": "slow_digits:Reward"}}, rollouts={"min_actors": 2})
    assert killed and not psutil.pid_exists(killed[0])
    assert summary["theta_sha256"] == local["theta_sha256"]


def _is_actor(process: psutil.Process) -> bool:
    return "RolloutActor" in " ".join(process.cmdline())


def test_a_killed_driver_resumes_to_the_same_weights(tmp_path: Path, local: dict[str, Any]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "runs"), "cluster": SMALL}))
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(recipe)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "short"
    while not (folder / "checkpoints" / "update_000001.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "summary.json").read_text())["theta_sha256"] == local["theta_sha256"]


@pytest.mark.usefixtures("cluster")
def test_own_reward_and_prompts_are_found_from_the_drivers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_prompts.txt").write_text("one\nseven\n")
    Path("my_reward_on_ray.py").write_text(
        "def brightness(images, prompts, metadata): return images.mean((1, 2, 3))\nbrightness.differentiable = True\n"
    )
    keys = {"reward": {"name": "my_reward_on_ray:brightness"}, "prompts": "my_prompts.txt", "train": {"iterations": 1}}
    config = short_run(tmp_path, cluster=SMALL, evaluation={"judge": None}, **keys)
    assert config.cluster != "none"
    run_on_ray(config, config.cluster, ignore, lambda: RunFolder(config).begin(resume=False))
    assert 0 < RunFolder(config).load_summary()["reward_before"] < 1


@pytest.mark.usefixtures("cluster")
def test_a_model_that_cannot_be_loaded_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """So --overwrite has deleted nothing."""
    config = short_run(tmp_path, cluster=SMALL, model={"name": "stable_diffusion", "path": "./nowhere"})
    assert config.cluster != "none"
    begun: list[bool] = []
    with pytest.raises(UserError, match="there is no such folder"):
        run_on_ray(config, config.cluster, ignore, lambda: begun.append(True))
    assert not begun and not config.folder.exists()


@pytest.mark.usefixtures("cluster")
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
    keys = {"reward": {"name": "my_reward_of_rank_0:broken"}, "evaluation": {"judge": None}}
    config = short_run(tmp_path, cluster=SMALL | {"workers": 2}, **keys)
    assert config.cluster != "none"
    with pytest.raises(UserError, match="my_reward_of_rank_0:broken' returned inf"):
        run_on_ray(config, config.cluster, ignore, lambda: RunFolder(config).begin(resume=False))
