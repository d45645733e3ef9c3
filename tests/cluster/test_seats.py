"""What a user's reward prints and how it crashes, in a process of Ray's: the driver tells both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlr_ray.cluster.seats import _crash, _remove_old
from rlr_ray.errors import UserError
from tests.cluster.test_runs import CLUSTER, summary_on_ray
from tests.runs import logged, small_run

CODE = """
import ctypes, os, sys

print("imported")

def crash():
    ctypes.string_at(0)

def f(images):
    print("scoring", len(images))
    actor = "RolloutActor" in open("/proc/self/cmdline").read()
    if actor == {actor} and os.path.exists("now"):
        crash()
    if os.path.exists("exit"):
        sys.exit("no weights")
    return images.mean((1, 2, 3)).tolist(), dict(seen=len(images))
"""
ZEROTH = {"first_order": {"steps": 0}, "sub_chain": {"length": 0}, "rest": "zeroth_order"}
ZEROTH |= {"zeroth_order": {"directions": "isotropic"}}
HALF = {"first_order": {"steps": 0}, "sub_chain": {"length": 0}, "rest": "half_order", "half_order": {"weight": 1.0}}


def test_only_a_crash_in_a_reward_is_told_as_one() -> None:
    lines = ["import ctypes, faulthandler, sys", "faulthandler.enable(all_threads=False)", "ctypes.string_at(0)"]
    trace = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False).stderr
    assert "Segmentation fault" in trace and _crash(trace) is None and _crash("") is None
    frames = f'  File "my_reward.py", line 7 in f\n  File "{Path("rlr_ray/rewards/own.py").resolve()}", line 3 in g\n'
    crash = _crash(trace.replace('  File "<string>"', f'{frames}  File "<string>"', 1))
    assert "crashed its process: Segmentation fault (my_reward.py, line 7, in f)" in str(crash)


def test_what_others_remove_at_the_same_time_hinders_no_start(tmp_path: Path) -> None:
    (tmp_path / "removed").symlink_to(tmp_path / "nowhere")  # as between listing and looking at it
    for name, seconds in (("old", 0), ("new", time.time())):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (seconds, seconds))
    _remove_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"removed", "new"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("actor", "flag", "words"),
    [
        (False, "now", r"crashed its process: Segmentation fault \(.*seat_reward_False.py, line 7, in crash\)"),
        (True, "now", r"crashed its process: Segmentation fault \(.*seat_reward_True.py, line 7, in crash\)"),
        (False, "exit", r"raised SystemExit: no weights \(.*seat_reward_False.py, line 15, in f\)"),
    ],
)
def test_a_reward_that_ends_its_process_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actor: bool, flag: str, words: str
) -> None:
    """After one start of another process in its place, not after four; and what it printed is seen here."""
    monkeypatch.chdir(tmp_path)
    Path(f"seat_reward_{actor}.py").write_text(CODE.format(actor=actor))
    keys: dict[str, Any] = {"estimator": ZEROTH if actor else HALF, "reward": {"name": f"seat_reward_{actor}:f"}}
    ended: list[float] = []

    def end_it(row: dict[str, Any]) -> None:
        if not ended:
            Path(flag).touch()
            ended.append(time.monotonic())

    with logged() as said, pytest.raises(UserError, match=words):
        summary_on_ray(small_run(tmp_path, cluster=CLUSTER, train={"iterations": 200}, **keys), end_it)
    assert time.monotonic() - ended[0] < 60
    assert {"imported", "scoring 2"} <= {*said}
    assert sum("the workers start again" in text for text in said) <= 1
