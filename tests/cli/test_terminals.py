"""Terminals that cannot show all, signals, interruptions and places as people write them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
import yaml

from rlr_ray import __main__ as entry
from rlr_ray.cli import main
from rlr_ray.cluster.launch import check_reachable, connected
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import config_of, load_config
from rlr_ray.errors import UserError
from rlr_ray.models.files import place_of
from rlr_ray.prompts.load import load_prompts
from rlr_ray.rewards.hub import Source
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.utils.signals import Terminated, after_update, heeded
from tests.runs import RECIPE, SMALL, outcome, small_recipe, tiny

REWARD = """
import signal
calls = 0
def f(images):
    global calls
    calls += 1
    for at, name in {plan}:
        if calls == at:
            signal.raise_signal(getattr(signal, name))  # to this thread: another's may heed it later
    return images.mean((1, 2, 3))
f.differentiable = True
"""


def recipe(folder: Path, **changes: Any) -> str:
    """A recipe of a small run in folder/runs."""
    keys = merge(RECIPE, SMALL | {"model": tiny(), "output_dir": str(folder / "runs")})
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(merge(keys, changes), allow_unicode=True), "utf-8")
    return str(file)


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_terminal_that_lacks_letters_ends_no_run(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.chdir(tmp_path)
    code = "def f(images):\n    print('cat 🐈 ─ é')\n    return images.mean((1, 2, 3))\nf.differentiable = True"
    Path("réward.py").write_text(code, "utf-8")
    keys = {"prompts": ["a café 🐈", "日本"], "reward": {"name": "réward.py:f"}, "train": {"iterations": 1}}
    assert main(["train", "--config", recipe(tmp_path, **keys), "--dry-run"]) == 0
    assert main(["train", "--config", recipe(tmp_path, **keys)]) == 0
    assert main(["train", "--config", recipe(tmp_path, **keys), "--set", "prompts=日本.txt"]) == 2
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert rb"cat \U0001f408 \u2500" in said and b"report:" in said


# --- signals, sent by the reward in the middle of an update


@pytest.fixture
def signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The exit status of a run whose reward sends signals at these of its calls, the first of them an evaluation."""
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def run(plan: list[tuple[int, str]], *more: str) -> int:
        Path("signals.py").write_text(REWARD.format(plan=plan))
        keys = {"reward": {"name": "signals.py:f"}, "train": {"checkpoint_every": 100}}
        for key in [key for key in sys.modules if key.endswith("signals_py")]:
            del sys.modules[key]
        return main(["train", "--config", recipe(tmp_path, **keys), "--set", f"name=run{len(plan)}", *more])

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint_after_the_update(
    name: str, signalled: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert signalled([]) == 0
    assert signalled([(5, name)]) == 128 + getattr(signal, name)
    told = capfd.readouterr().err
    steps = RunFolder(config_of(None, [], "runs/run1")).checkpoints.steps()
    assert len(steps) == 1 and 0 < steps[0] < 4
    assert f"{name}: the run ends after this update" in told and "Traceback" not in told
    assert f"{name} after update {steps[0]}, whose checkpoint is saved; `rlr-ray train --resume" in told
    Path("signals.py").write_text(REWARD.format(plan=[]))
    assert main(["train", "--resume", "run1", "--accept-changes"]) == 0
    kept = [outcome(Path("runs") / run) for run in ("run0", "run1")]
    for each in kept:
        each.pop("changes"), each.pop("warnings")
    assert kept[0]["theta_sha256"] == kept[1]["theta_sha256"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_ends_it_at_once_and_one_before_updates_too(
    signalled: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert signalled([(5, "SIGTERM"), (5, "SIGTERM")]) == 143
    assert "`rlr-ray train --resume" in (told := capfd.readouterr().err) and "begins it again: it has left no" in told
    assert signalled([(1, "SIGTERM")], "--set", "name=other") == 143
    assert "SIGTERM; `rlr-ray train --resume" in (told := capfd.readouterr().err) and "Traceback" not in told


def test_ctrl_c_is_answered_with_what_is_true_then(
    signalled: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert signalled([(5, "SIGINT")]) == 130
    assert "begins it again: it has left no checkpoint yet" in capfd.readouterr().err
    assert signalled([(10, "SIGINT")], "--resume", "--accept-changes", "--set", "train.checkpoint_every=1") == 130
    assert "goes on from update " in capfd.readouterr().err
    assert signalled([(1, "SIGINT")], "--dry-run") == 0
    assert signalled([(1, "SIGINT")], "--set", "reward.name=signals_at_import.py:f") == 2


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with heeded(), after_update():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_runs_in_several_threads_leave_no_signal_waiting() -> None:
    """Whichever ends first."""
    one, other = after_update(), after_update()
    one.__enter__(), other.__enter__()
    one.__exit__(None, None, None), other.__exit__(None, None, None)
    with heeded(), pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)


class _Interrupted(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise KeyboardInterrupt


def test_ctrl_c_while_parts_are_imported_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "rlr_ray.cli", _Interrupted("rlr_ray.cli"))
        assert entry.main() == 130
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "rlr_ray.cli.lab", _Interrupted("rlr_ray.cli.lab"))
        assert main(["lab", "--model", "toy"]) == 130
    assert capfd.readouterr().err == "interrupted; nothing was begun\ninterrupted; the same command begins again\n"


# --- places


def test_home_and_variables_stand_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    file = Path(small_recipe(tmp_path))
    (tmp_path / "p.txt").write_text("a cat")
    (tmp_path / "clip").mkdir()
    for start in ("~", "$HOME", "${DATA}"):
        config = load_config(f"{start}/{file.name}", [f"output_dir={start}/out"])
        assert config.folder == tmp_path / "out" / "short"
        assert load_prompts(f"{start}/p.txt")[0].text == "a cat"
        assert place_of("model.path", f"{start}/clip") == tmp_path / "clip"
        assert Source("x", "path", f"{start}/clip", "a/b", []).folder == tmp_path / "clip"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.0.0.1", "'10.0.0.1' .* has no port; allowed: host:port, auto, local; write 10.0.0.1:6379"),
        ("head:", "'head:' .* has no port; .*write head:6379"),
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"),
        ("ray://head:10001", "Ray's client"),
    ],
)
def test_an_address_of_no_ray_is_refused(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_reachable(address)


def test_auto_without_a_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nothing)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with (
        pytest.raises(UserError, match=r"no Ray is there to connect to \(Could not .*unset RAY_ADDRESS"),
        connected(ClusterConfig()),
    ):
        pass


def test_to_resume_where_nothing_was_begun_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "mine"]) == 2
    assert "(there is none), or the path of a run's folder; leave out --resume to begin one" in capfd.readouterr().err
    assert main(["train", "--config", recipe(tmp_path), "--resume"]) == 2
    assert "holds no run to resume; leave out --resume" in capfd.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_on_ray_leaves_a_checkpoint_and_no_stack(tmp_path: Path) -> None:
    keys = {"cluster": {"worker": {"cpus": 0.5}}, "train": {"iterations": 100_000, "checkpoint_every": 50_000}}
    keys |= {"estimator": {"rest": "half_order"}}
    command = [sys.executable, "-m", "rlr_ray", "train", "--config", recipe(tmp_path, **keys)]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        metrics = tmp_path / "runs" / "short" / "config.yaml"
        while not (metrics.exists() and "update " in log.read_text()):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    told = log.read_text()
    assert "SIGTERM after update" in told and "Traceback" not in told and "PC: @" not in told
    step = RunFolder(config_of(None, [f"output_dir={tmp_path / 'runs'}"], "short")).checkpoints.steps()
    assert len(step) == 1 and json.dumps(step)[1:-1] in told
