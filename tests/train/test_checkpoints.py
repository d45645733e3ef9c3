"""Nothing is lost: damaged checkpoints, a disk that fills up, kill -9 at any moment, two runs of one name."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_ray.cli import main
from rlr_ray.config.estimator import merge
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.train.checkpoints import changed_keys
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.utils.files import Unreadable, load_sealed, save_sealed
from tests.runs import logged, outcome, small_recipe, small_run, tiny, train_here

CPU = torch.device("cpu")
Report = Callable[[dict[str, Any]], None]


def run(config: RunConfig, report: Report = lambda row: None, *, resume: bool = False) -> list[str]:
    """Train in this process; returns what was logged of troubles."""
    with logged() as said:
        train_here(config, report, resume=resume)
    return [text for text in said if not text.startswith("going on from update ")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    config = small_run(tmp_path_factory.mktemp("whole"))
    run(config)
    return config.folder


@pytest.fixture
def copied(tmp_path: Path, whole: Path) -> Path:
    """Its copy, whose checkpoints are of updates 3 and 4."""
    return shutil.copytree(whole, tmp_path / "short")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_anywhere_is_noticed_and_so_is_any_missing_end(tmp_path: Path) -> None:
    file = tmp_path / "sealed"
    save_sealed(file, {"theta": torch.arange(100.0), "step": 3})
    assert load_sealed(file, CPU)["theta"].tolist() == list(range(100))
    assert torch.load(file, weights_only=True)["step"] == 3  # the seal is in no one's way
    whole = file.read_bytes()
    for at in (*range(0, len(whole) - 72, 41), *range(len(whole) - 72, len(whole))):  # all of the seal
        flip(file, at)
        with pytest.raises(Unreadable, match=r"is damaged|is cut off"):
            load_sealed(file, CPU)
        file.write_bytes(whole)
    for length in (0, 1, 71, 72, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(Unreadable, match="is cut off"):
            load_sealed(file, CPU)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(copied: Path, whole: Path, damage: str) -> None:
    newest = copied / "checkpoints" / "update_000004.pt"
    size = newest.stat().st_size
    if damage == "truncated":
        os.truncate(newest, size // 2)
    else:
        flip(newest, size // 2)
    flip(copied / "samples" / "before.pt", 1000)  # measured again
    (copied / "metrics.parquet").write_bytes(b"")  # it is made of metrics.jsonl
    (copied / "config.yaml").unlink()  # every checkpoint holds it
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # a line that a kill cut short
    said = run(small_run(copied.parent), resume=True)
    why = {"truncated": "is cut off", "flipped": "is damaged"}[damage]
    assert len(said) == 1 and str(newest) in said[0] and why in said[0]
    assert said[0].endswith("; going on from update_000003.pt instead")
    assert outcome(copied) == outcome(whole)
    assert run(small_run(copied.parent), resume=True) == []  # the damaged one was replaced


def test_lost_rows_are_told_of_and_cost_no_run(copied: Path, whole: Path) -> None:
    (copied / "metrics.jsonl").unlink()
    (said,) = run(small_run(copied.parent), resume=True)
    assert said.startswith(f"4 of 4 updates are not in {copied / 'metrics.jsonl'}; the run goes on")
    summaries = [RunFolder(small_run(folder.parent)).load_summary() for folder in (copied, whole)]
    results = [[summary[key] for key in ("steps", "gain", "theta_sha256")] for summary in summaries]
    assert results[0] == results[1]


def test_a_run_that_was_moved_and_renamed_goes_on_by_its_own_recipe(copied: Path, whole: Path) -> None:
    (copied / "checkpoints" / "update_000004.pt").unlink()
    moved = copied.rename(copied.with_name("moved"))
    assert main(["train", "--resume", str(moved), "--set", "train.checkpoint_every=2"]) == 0
    assert outcome(moved) == outcome(whole)
    assert sorted(path.name for path in moved.parent.iterdir()) == [".moved.holder", ".moved.lock", "moved"]


def test_files_that_are_no_states_are_no_ones_checkpoints(copied: Path, whole: Path) -> None:
    (copied / "checkpoints" / "update_000004.pt").unlink()
    for name in ("update_best.pt", "update_.pt", "best.pt"):
        (copied / "checkpoints" / name).write_bytes(b"mine")
    assert run(small_run(copied.parent, evaluation={"pictures": 1}), resume=True) == []
    assert load_sealed(copied / "samples" / "before.pt", CPU)["images"].shape[0] == 1  # measured again
    assert outcome(copied) == outcome(whole)
    assert (copied / "checkpoints" / "update_best.pt").read_bytes() == b"mine"


def test_what_was_measured_before_by_another_version_is_measured_again(copied: Path, whole: Path) -> None:
    before = copied / "samples" / "before.pt"
    for change in ({"format": 0}, {"format": 0, "sharpness": 1.0}):
        save_sealed(before, load_sealed(before, CPU) | change)
        assert run(small_run(copied.parent), resume=True) == []
        assert load_sealed(before, CPU).keys() == load_sealed(whole / "samples" / "before.pt", CPU).keys()
    assert outcome(copied) == outcome(whole)


def test_a_run_does_not_go_on_with_other_prompts_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_run(tmp_path, prompts="mine.txt", train={"iterations": 1})
    Path("mine.txt").write_text("a handwritten three\na handwritten eight\n")
    run(config)
    Path("mine.txt").write_text("a handwritten three\na handwritten nine\n")
    with pytest.raises(UserError, match=r"begun with other contents of prompts, .*--accept-changes"):
        run(config, resume=True)


def test_if_all_checkpoints_are_damaged_nothing_starts_from_zero(copied: Path) -> None:
    for file in (copied / "checkpoints").iterdir():
        flip(file, 5000)
    with pytest.raises(UserError, match=r"no checkpoint .*000004.pt is damaged.*000003.pt is damaged.*--overwrite"):
        run(small_run(copied.parent), resume=True)


def test_a_checkpoint_of_another_format_or_config_is_passed_over(copied: Path) -> None:
    """As an orphan of a killed run may leave it in the folder of the run that took its place."""
    checkpoints = copied / "checkpoints"
    state = load_sealed(checkpoints / "update_000004.pt", CPU)
    save_sealed(checkpoints / "update_000005.pt", state | {"config": merge(state["config"], {"seed": 7})})
    save_sealed(checkpoints / "update_000006.pt", state | {"format": 0})
    with logged() as said:
        loaded = RunFolder(small_run(copied.parent)).checkpoints.load(CPU)
    assert loaded is not None and loaded["step"] == 4
    assert ["has format 0" in said[0], "another config (seed: was 7, now 0)" in said[1], len(said)] == [True, True, 2]


def test_where_a_reward_lies_and_how_it_is_asked_may_change_but_not_what_counts(tmp_path: Path) -> None:
    own = {"name": "digits", "normalize": False}
    saved = small_run(tmp_path, reward=None, rewards={"pkg.a:b": own, "digits": {}}).model_dump(mode="json")

    def changed(**keys: Any) -> list[str]:
        rewards = {"pkg.a:b": own | keys.pop("reward", {}), "digits": {}}
        return changed_keys(saved, small_run(tmp_path, reward=None, rewards=rewards, **keys))

    free = {"invalid": -1, "options": {"headers": {"A": "${B}"}, "timeout_s": 9}, "actors": {"cpus": 2}}
    judges = {"digits_judge": {"invalid": 0}}
    assert changed(reward=free, cluster={}, evaluation={"judge": None, "judges": judges, "clip": "/models/clip"}) == []
    other = {"options": {"url": "http://elsewhere"}}
    assert changed(reward=other) == ["rewards.pkg.a:b.options.url: was None, now 'http://elsewhere'"]
    assert changed(reward={"weight": 2.0}) == ["rewards.pkg.a:b.weight: was 1.0, now 2.0"]
    assert changed(evaluation={"chains": 4}) == ["evaluation.chains: was 2, now 4"]
    assert changed_keys(saved, small_run(tmp_path))[0].startswith("rewards.pkg.a:b.")  # though its invalid is free


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill a disk to its last byte."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    yield
    ballast.unlink()


@contextlib.contextmanager
def small_files_only(folder: Path) -> Iterator[None]:
    """Let no file of this process grow beyond 1000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_full_disk(config: RunConfig, whole: Path, limit: Callable[[Path], contextlib.AbstractContextManager]) -> None:
    """The disk is full from after update 1 until after update 2: checkpoint 1 stays, and the end is the same."""
    full = contextlib.ExitStack()
    checkpoints = config.folder / "checkpoints"

    def report(row: dict[str, Any]) -> None:
        if row["step"] == 0:
            full.enter_context(limit(config.folder.parent))
        if row["step"] == 1:
            assert [path.name for path in checkpoints.iterdir()] == ["update_000001.pt"]
            assert load_sealed(checkpoints / "update_000001.pt", CPU)["step"] == 1
            full.close()

    with full:
        said = run(config, report)
    lost = {text.split()[1].rstrip(":"): text for text in said if text.startswith("logger ")}
    assert {"parquet"} <= lost.keys() <= {"parquet", "tensorboard"}  # once each; events may fit into their last block
    full_, again = [text for text in said if text not in lost.values()]
    assert str(config.folder) in full_ and "tries again after every update" in full_
    assert again == "saved again, at update 3"
    assert outcome(config.folder) == outcome(whole)
    assert not list(config.folder.rglob(".*"))


def test_a_disk_that_fills_up_and_is_freed_loses_nothing(small_disk: Path, whole: Path) -> None:
    check_full_disk(small_run(small_disk), whole, full_disk)


def test_a_limit_on_files_that_is_lifted_loses_nothing(tmp_path: Path, whole: Path) -> None:
    check_full_disk(small_run(tmp_path), whole, small_files_only)


@pytest.mark.parametrize("after", [3, 4])
def test_a_disk_that_stays_full_at_the_end_is_an_error_and_resume_ends_the_run(
    small_disk: Path, whole: Path, after: int
) -> None:
    """The last checkpoint, or the results after it, cannot be written."""
    full, config = contextlib.ExitStack(), small_run(small_disk)

    def report(row: dict[str, Any]) -> None:
        if row["step"] + 1 == after:
            full.enter_context(full_disk(small_disk))

    with full, pytest.raises(UserError, match=r"could not save: .*No space left.*free space .*--resume"):
        run(config, report)
    assert not (config.folder / "summary.json").exists()
    assert run(config, resume=True) == []
    assert outcome(config.folder) == outcome(whole)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Real processes, which a server that has imported everything forks: tests that kill need many."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def killed(kill_at: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a process of its own, which kills itself before what it does `kill_at`-th to the folder."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    left = kill_at

    def count(event: str, values: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in ("os.rename", "os.mkdir", "open") and str(values[0]).startswith(str(folder))
        if changes or event in ("os.remove", "os.rmdir"):  # named from the folder that they are in
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sys.exit(function(*arguments))


def ended(process: Any) -> bool:
    """Wait for it: True if it came through, False if it was killed."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_ends_the_same(tmp_path: Path, whole: Path, processes: Any) -> None:
    """The parts of one run, each killed before a random one of all its changes to the disk, until one comes through."""
    draw, runs, lives = random.Random(2), tmp_path / "runs", 1
    arguments = ["train", "--config", str(small_recipe(tmp_path)), "--resume-or-start"]
    while True:
        process = processes.Process(target=killed, args=(draw.randrange(1, 100), runs, main, arguments))
        process.start()
        if ended(process):
            break
        lives += 1
    assert 4 < lives < 30
    assert outcome(runs / "short") == outcome(whole)
    assert not list((runs / "short").rglob(".*"))


@pytest.mark.slow
def test_killed_among_its_results_ends_with_the_same_summary(copied: Path, whole: Path, processes: Any) -> None:
    """The last checkpoint is there; the adapter, the pictures or the summary are not."""
    (copied / "summary.json").unlink()
    arguments = ["train", "--resume", str(copied)]
    for kill_at in (12, 18, 24):
        process = processes.Process(target=killed, args=(kill_at, copied, main, arguments))
        process.start()
        assert not ended(process)
        assert not (copied / "summary.json").exists()
    assert main(arguments) == 0
    assert outcome(copied) == outcome(whole)


def begin(config: RunConfig) -> None:
    RunFolder(config).begin(resume=False)


@pytest.mark.slow
def test_killed_while_it_overwrites_a_run_leaves_the_old_one_whole_or_none(copied: Path, processes: Any) -> None:
    config = small_run(copied.parent)
    files = sorted(copied.rglob("*"))
    for kill_at in range(1, 60):
        process = processes.Process(target=killed, args=(kill_at, copied.parent, begin, config))
        process.start()
        if ended(process):
            break
        assert sorted(copied.rglob("*")) == files or not RunFolder(config).checkpoints.steps()
    assert kill_at > 5
    assert [path.name for path in copied.parent.iterdir()] == ["short"]
    assert {path.name for path in copied.rglob("*")} == {"config.yaml", "contents.json", "checkpoints", "samples"}


@pytest.mark.slow
def test_the_second_of_two_is_refused_until_the_first_is_killed(
    tmp_path: Path, whole: Path, processes: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(small_recipe(tmp_path))]
    folder = tmp_path / "runs" / "short"
    first = processes.Process(target=main, args=(arguments,))
    first.start()
    while not (folder / "checkpoints" / "update_000001.pt").exists():
        assert first.is_alive()
        time.sleep(0.01)
    for more in ([], ["--overwrite"], ["--resume"], ["--resume-or-start"]):
        assert main([*arguments, *more]) == 2
        assert f"is held by process {first.pid} on {os.uname().nodename} since 20" in capfd.readouterr().err
    assert first.is_alive() and (folder / "checkpoints" / "update_000001.pt").exists()
    first.kill()
    assert not ended(first)
    assert not (folder / "summary.json").exists()
    assert main([*arguments, "--resume"]) == 0
    assert outcome(folder) == outcome(whole)


def test_keys_that_came_after_a_run_was_begun_do_not_keep_it_from_going_on(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    saved = config.model_dump(mode="json")
    for key in ("gradient_checkpointing", "num_frames", "motion_adapter", "dtype"):
        del saved["model"][key]
    assert changed_keys(saved, config) == []
    assert changed_keys(saved | {"seed": 5}, config) == ["seed: was 5, now 0"]


def test_what_only_saves_memory_may_change(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    thrifty = tiny() | {"gradient_checkpointing": True, "decode_slice": 1, "compile": True}
    changed = small_run(
        tmp_path,
        model=thrifty,
        estimator={"checkpoint_steps": True},
        train={"sampling_size": 4},
        evaluation={"chunk_size": 1, "pictures": 1},
    )
    assert changed_keys(config.model_dump(mode="json"), changed) == []
