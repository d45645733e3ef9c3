"""Processes killed, nodes that come and go, rewards that hang: a run ends with the same weights, or says why not.

Not part of `make test`: `python -m pytest -m system tests/system/chaos`, about 20 minutes on two cores.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.system.chaos.killing import KINDS, PLANS, Kind, Run, lost, planned, trial

pytestmark = pytest.mark.system

LIVES_S = 20.0  # of an actor that is killed again and again: it takes up to half of that to start

HANGING = """
import pathlib, time
from rlr_ray.rewards.digits import Digits

class Reward(Digits):
    def forward(self, images, prompts, metadata):
        note, where = pathlib.Path({note!r}), pathlib.Path("/proc/self/cmdline").read_bytes()
        if {role!r} in where and not note.exists():
            note.touch()
            time.sleep(3600)
        return super().forward(images, prompts, metadata)
"""

SLOW = """
import os, pathlib, time
from rlr_ray.rewards.digits import Digits

class Reward(Digits):
    def forward(self, images, prompts, metadata):
        note, where = pathlib.Path({note!r}), pathlib.Path("/proc/self/cmdline").read_bytes()
        if b"RolloutActor" in where:
            try:
                note.open("x").write(str(os.getpid()))
            except FileExistsError:
                pass
            time.sleep(2.0 if note.read_text() == str(os.getpid()) else 0.05)
        return super().forward(images, prompts, metadata)
"""


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sha(tmp_path_factory: pytest.TempPathFactory, plan: str) -> str:
    """The weights of the run when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, planned(folder, plan))
    run.start()
    assert run.finish() == 0
    return str(run.summary()["theta_sha256"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_changes_nothing(tmp_path: Path, sha: str, plan: str, kind: Kind) -> None:
    came = trial(tmp_path, kind, seed=0, span_s=10.0, plan=plan)
    assert came is not None and came.theta_sha256 == sha
    assert lost(came) <= 0


def local_sha(folder: Path, plan: str, iterations: int) -> str:
    """The weights of a longer run in a single process."""
    run = Run(folder, planned(folder, plan, train={"iterations": iterations}) | {"cluster": "none"})
    run.start()
    assert run.finish() == 0
    return str(run.summary()["theta_sha256"])


def test_actors_killed_again_and_again(tmp_path: Path, plan: str) -> None:
    run = Run(tmp_path, planned(tmp_path, plan, train={"iterations": 40}))
    run.start()
    run.wait_for("worker")
    killed = 0
    assert run.process is not None
    while run.process.poll() is None:
        for actor in run.find("actor"):
            if time.time() - actor.create_time() > LIVES_S:
                actor.kill()
                killed += 1
        time.sleep(3.0)
    assert run.finish() == 0 and killed > 2
    assert run.summary()["theta_sha256"] == local_sha(tmp_path / "local", plan, 40)


def hanging(tmp_path: Path, plan: str, role: bytes, **cluster: Any) -> Run:
    """A run whose reward hangs once, in a process of this role."""
    source = HANGING.format(note=str(tmp_path / "note"), role=role)
    (tmp_path / "hanging.py").write_text(source)
    return Run(tmp_path, planned(tmp_path, plan, reward={"name": "hanging:Reward"}, cluster=cluster))


def test_a_reward_that_hangs_in_a_rollout_costs_its_actor(tmp_path: Path, sha: str, plan: str) -> None:
    run = hanging(tmp_path, plan, b"RolloutActor", rollouts={"timeout_s": 10, "hedge_after": None})
    run.start()
    assert run.finish() == 0 and (tmp_path / "note").exists()
    assert run.summary()["theta_sha256"] == sha


def test_an_actor_that_is_slow_has_its_chunks_run_by_others(tmp_path: Path, sha: str, plan: str) -> None:
    """Of two, the first that rates is forty times as slow as the other; who waits helps, too."""
    (tmp_path / "slow.py").write_text(SLOW.format(note=str(tmp_path / "note")))
    cluster = {"rollouts": {"hedge_after": 1.5}}
    run = Run(tmp_path, planned(tmp_path, plan, reward={"name": "slow:Reward"}, cluster=cluster))
    run.start()
    assert run.finish() == 0
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(row["rollouts_hedged"] for row in rows)
    assert run.summary()["theta_sha256"] == sha


def test_a_reward_that_hangs_in_the_trainer_ends_the_run_saying_where(tmp_path: Path) -> None:
    run = hanging(tmp_path, "all orders", b"RayTrainWorker", stall_s=30)
    run.start()
    assert run.process is not None and run.process.wait() == 2
    assert re.search(r"no update came back for 30 s .*hanging\.py.*time\.sleep", run.said(), re.DOTALL)


def test_nodes_that_go_and_come_change_nothing(tmp_path: Path, plan: str) -> None:
    """Half of the actors' node is lost, then another joins; elastic workers take the new one too."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        first = cluster.add_node(num_cpus=1)
        keys: dict[str, Any] = {
            "address": cluster.address,
            "workers": {"min": 1, "max": 2},  # of which there is room for one at first
            "worker": {"cpus": 1.0},
            "rollouts": {"min_actors": 1, "max_actors": 4},
            "wait_s": 60,
        }
        run = Run(tmp_path, planned(tmp_path, plan, cluster=keys, train={"iterations": 40}))
        run.start()
        assert run.process is not None
        while run.newest_checkpoint() < 4:
            assert run.process.poll() is None, run.said()
            time.sleep(0.2)
        cluster.remove_node(first, allow_graceful=False)
        cluster.add_node(num_cpus=2)
        assert run.finish() <= 1
    finally:
        cluster.shutdown()
    assert run.summary()["theta_sha256"] == local_sha(tmp_path / "local", plan, 40)
    sizes = set(re.findall(r"training on (\d) worker", run.said()))
    assert {"1", "2"} <= sizes, run.said()
