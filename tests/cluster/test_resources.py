"""Whether a run fits a cluster, and that runs that want the same room do not block each other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from rlr_ray.cluster import resources
from rlr_ray.cluster.doctor import examine_cluster
from rlr_ray.cluster.launch import call_in_task, check_reachable, connected
from rlr_ray.cluster.machine import Verdict, left_token
from rlr_ray.cluster.resources import Reservation, _message, hold_resources, missing_of, place
from rlr_ray.cluster.rollouts import await_ready
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.rewards import JudgeConfig, RewardActorsConfig
from rlr_ray.errors import UserError
from tests.runs import logged, short_run


def test_a_process_goes_where_it_fits_and_leaves_what_is_scarce() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert place([{"CPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 1}], nodes) == [0, 1, 0]
    assert place([{"CPU": 4, "GPU": 1}, {"CPU": 8}], [{"CPU": 8, "GPU": 1}, {"CPU": 32}]) == [0, 1]
    assert place([{"CPU": 1}, {"trainer": 1, "CPU": 1}], [{"CPU": 2, "trainer": 9}, {"CPU": 2}]) == [1, 0]
    assert None not in place([{"CPU": 0.1}] * 40, [{"CPU": 4.0}])  # though the sum of 0.1 is off in the last bits


def test_a_process_that_no_node_holds_has_no_place_though_the_sum_would_do() -> None:
    assert place([{"CPU": 3}], [{"CPU": 2.0}, {"CPU": 2.0}]) == [None]
    assert place([{"GPU": 0.5}] * 3, [{"CPU": 8.0, "GPU": 1.0}]) == [0, 0, None]
    assert missing_of([{"CPU": 3}], [{"CPU": 2.0}, {"CPU": 2.0}]) == "no node has 3 CPU for one process"
    assert missing_of([{"CPU": 2}] * 3, [{"CPU": 2.0}, {"CPU": 2.0}]) == "too little CPU for all of them"
    assert missing_of([{"CPU": 2}] * 2, [{"CPU": 2.0}, {"CPU": 2.0}]) == ""


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"worker": {"gpus": 1}}, r"needs .* 1 GPU .*has only 4 CPU, 0 GPU: no node has 1 CPU, 1 GPU"),
        ({"rollouts": {"min_actors": 64, "max_actors": 64}}, r"needs 33 CPU .*lower cluster\.rollouts\.min_actors"),
        ({"worker": {"resources": {"trainer": 1}}}, r"1 trainer"),
    ],
    ids=str,
)
def test_what_the_cluster_can_never_hold_is_refused_at_once(keys: dict[str, Any], words: str) -> None:
    cluster, began = ClusterConfig.model_validate(keys), time.monotonic()
    with pytest.raises(UserError, match=words), hold_resources(cluster, cluster.rollouts.min_actors, local=True):
        pass
    assert time.monotonic() - began < 10


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_what_may_come_is_waited_for_saying_so() -> None:
    cluster = ClusterConfig.model_validate({"worker": {"gpus": 1}, "wait_s": 1})
    refused = pytest.raises(UserError, match="had within 1 s only")
    with logged() as said, refused, hold_resources(cluster, 1, local=False):
        pass
    assert "waiting up to 1 s for the cluster to grow: no node has 1 CPU, 1 GPU for one process" in said[0]


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_runs_that_want_the_same_room_take_turns() -> None:
    """As trials of a search do: each needs 1.5 + 1.5 of 4 CPUs, so halves of two of them fit, but only one run."""
    cluster = ClusterConfig.model_validate({"worker": {"cpus": 1.5}, "rollouts": {"cpus": 1.5}, "wait_s": 120})
    inside, most, failures = 0, 0, list[BaseException]()

    def run() -> None:
        nonlocal inside, most
        try:
            with hold_resources(cluster, 1, local=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0.5)
                inside -= 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and most == 1


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_doctor_says_what_would_go_where(tmp_path: Path) -> None:
    config = short_run(tmp_path, cluster={}, reward={"actors": {"cpus": 0.25}})

    def placement(keys: dict[str, Any]) -> Verdict:
        with left_token(config.folder.parent) as token:
            reports, (nodes, _, placed) = examine_cluster(config, ClusterConfig.model_validate(keys), token)
        assert nodes.ok and [(report.shares_folder, report.unwritable) for report in reports] == [(True, "")]
        return placed

    well, spot = placement({}), {"rollouts": {"resources": {"spot": 1}}}
    assert well.ok and well.state.count("->") == 3 and "has to come" not in well.state
    assert "actor of reward digits (0.25 CPU) ->" in well.state
    missing, waited = placement(spot), placement(spot | {"wait_s": 900})
    assert not missing.ok and "rollout actor (0.5 CPU, 1 spot) -> a node that has to come" in missing.state
    assert waited.ok and waited.state == missing.state


def test_what_there_is_no_room_for_is_told_with_the_keys_that_take_it() -> None:
    cluster, apart = ClusterConfig(), {"ocr": JudgeConfig(name="digits", actors=RewardActorsConfig(gpus=1))}
    words = _message(cluster, 1, apart, "too little GPU", "has only", {"CPU": 4})
    assert (
        "needs 2.5 CPU, 1 GPU" in words and "cluster.workers or actors.replicas, .cpus or .gpus of reward ocr" in words
    )
    assert "cluster: none" not in words  # which refuses actors
    without = _message(cluster, 1, {}, "too little CPU", "has only", {"CPU": 1})
    assert "lower cluster.rollouts.min_actors, cluster.rollouts.cpus or cluster.workers, add" in without
    assert without.endswith("or set cluster: none to run in this process")


def test_a_process_that_is_lost_while_it_measures_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a search leaves out a point whose measurement takes all memory."""

    def lost(call: Any) -> None:
        raise WorkerCrashedError

    task = SimpleNamespace(remote=lambda *values: None)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(options=lambda **_: task))
    monkeypatch.setattr(ray, "get", lost)
    with pytest.raises(UserError, match=r"was lost .*lower train\.chunk_size"):
        call_in_task(1, 0, "DEFAULT", print, short_run(tmp_path), {})


@pytest.mark.parametrize("error", [ray.exceptions.RayActorError, lambda: ray.exceptions.OutOfMemoryError("its node")])
def test_an_actor_that_dies_at_every_start_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def died(call: Any) -> None:
        raise error()

    monkeypatch.setattr(ray, "get", died)
    monkeypatch.setattr("rlr_ray.cluster.rollouts._RETURN_S", 0.0)
    with pytest.raises(UserError, match=r"^actor 1 died 3 times while it started; lower replicas$"):
        await_ready({"actor 1": lambda: None}, 3, "lower replicas")  # type: ignore[dict-item,return-value]


def test_an_address_where_no_ray_answers_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"no Ray answers at 127\.0\.0\.1:9 .*RAY_ADDRESS"):
        check_reachable("127.0.0.1:9")
    check_reachable("auto")
    check_reachable("")


@pytest.mark.parametrize("starts", [True, False])
def test_a_ray_that_is_started_here_is_known_by_its_processes(monkeypatch: pytest.MonkeyPatch, starts: bool) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def init(**options: Any) -> None:
        started.extend([subprocess.Popen(["sleep", "60"])] if starts else [])

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for name, stand_in in {"is_initialized": lambda: False, "init": init, "shutdown": lambda: None}.items():
        monkeypatch.setattr(ray, name, stand_in)
    with connected(ClusterConfig()) as alone:
        assert alone is starts
    for process in started:
        process.kill()
        process.wait()


def test_with_a_ray_whose_coordinator_lies_elsewhere_the_pool_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator", None)
    resources._autoscaling.cache_clear()
    with logged() as said:
        for essential in (True, False):
            wished = Reservation({"CPU": 1.0}, 2, essential=essential)
            assert wished.renew() == {}
            wished.cancel()
    resources._autoscaling.cache_clear()
    assert len(said) == 1 and "stays at cluster.rollouts.min_actors; install the Ray of constraints.txt" in said[0]
