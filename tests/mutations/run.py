"""Plant faults, one at a time, and see that tests fail: `python -m tests.mutations.run [--sample 10] [--only PATTERN]`.

tests/mutations/*.yaml list them: `file` (in rlr_ray/), `find` (text that is in it once), `replace`, `tests` (ids, one
of which must fail) and `why` (what would be wrong). A fault is planted in a copy of the tree, never in the real one.
Its tests run in a process that is forked from this one, which has imported all but the package: no seconds for a start.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COPIED = ("rlr_ray", "tests", "bench", "configs", "tune_configs", "examples", "scripts", "pyproject.toml", "README.md")
# A fault that ends in one of these is no fault of what the code does, but a mistake in the list.
MISTAKES = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")
AT_ONCE, LIMIT_S = 2, 300


@dataclasses.dataclass(frozen=True)
class Fault:
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    why: str
    listed: str  # in which file

    def check(self) -> None:
        """Raise ValueError if it cannot be planted: the code has changed."""
        count = (ROOT / "rlr_ray" / self.file).read_text("utf-8").count(self.find)
        if count != 1:
            raise ValueError(f"{self.why}: `find` is {count} times in {self.file}; allowed: once; correct the list")

    def plant(self, tree: Path) -> None:
        file = tree / "rlr_ray" / self.file
        text = file.read_text("utf-8").replace(self.find, self.replace)
        file.unlink()  # what the tree holds are links
        file.write_text(text, "utf-8")
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()


@dataclasses.dataclass(frozen=True)
class Outcome:
    verdict: str  # caught, SURVIVED, or what is wrong with the list
    killer: str  # the test that failed, and with which exception
    seconds: float  # of CPU


def load(folder: Path = Path(__file__).parent) -> list[Fault]:
    """All faults. Raises ValueError for one whose text is not in its file once."""
    lists = {file.stem: yaml.safe_load(file.read_text("utf-8")) for file in sorted(folder.glob("*.yaml"))}
    faults = [
        Fault(**entry | {"tests": tuple(entry["tests"]), "listed": name})
        for name, entries in lists.items()
        for entry in entries
    ]
    for fault in faults:
        fault.check()
    return faults


class FirstFailure:
    """A plugin of pytest that keeps which test failed first, and how."""

    def __init__(self) -> None:
        self.words = ""
        self.kinds: list[str] = []

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        self.kinds.append(call.excinfo.typename)
        self.words = self.words or f"{node.nodeid} ({call.excinfo.typename})"


def run_tests(tree: Path, tests: Sequence[str], *, stop: bool) -> None:
    """In a forked process: run tests on a tree, write what came of it beside the tree, end the process."""
    os.setsid()
    with open(os.devnull, "rb") as nothing, (tree.parent / "output").open("wb") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    failure = FirstFailure()
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu",
        f"--rootdir={tree}",
        f"--basetemp={tree.parent / 'tmp'}",
    ]
    code = pytest.main([*arguments, *(["-x"] if stop else []), *tests], plugins=[failure])
    (tree.parent / "result").write_text(json.dumps([int(code), failure.words, failure.kinds]))
    sys.stdout.flush()
    os._exit(0)


def snapshot(folder: Path) -> None:
    """Copy what tests need of the working tree, which may change meanwhile."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        elif (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)


def fork(copy: Path, folder: Path, tests: Sequence[str], fault: Fault | None) -> int:
    """A process that runs `tests` on a tree of links to the copy, with the fault planted; its id."""
    tree = folder / "tree"
    shutil.copytree(copy, tree, copy_function=os.link)
    if fault:
        fault.plant(tree)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            run_tests(tree, tests, stop=fault is not None)
        finally:
            os._exit(1)
    return pid


def judge(folder: Path, seconds: float) -> Outcome:
    """What came of a fault's tests."""
    if not (folder / "result").exists():
        return Outcome("NO RESULT (hangs or dies)", "", seconds)
    code, words, kinds = json.loads((folder / "result").read_text())
    if code == pytest.ExitCode.OK:
        return Outcome("SURVIVED", "", seconds)
    if code != pytest.ExitCode.TESTS_FAILED or any(kind in MISTAKES for kind in kinds):
        return Outcome("NOT A FAULT (correct the list)", words or f"pytest ended with {code}", seconds)
    return Outcome("caught", words, seconds)


def run_all(faults: Sequence[Fault], scratch: Path) -> Iterator[tuple[Fault, Outcome]]:
    """Each fault with its outcome, as they come; two at once."""
    waiting, running = list(enumerate(faults)), dict[int, tuple[Fault, Path, float]]()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, fault = waiting.pop(0)
            folder = scratch / str(number)
            folder.mkdir()
            running[fork(scratch / "copy", folder, fault.tests, fault)] = (fault, folder, time.monotonic())
        pid, _, spent = os.wait4(-1, os.WNOHANG)
        for late in [late for late, (*_, begun) in running.items() if time.monotonic() - begun > LIMIT_S]:
            os.killpg(late, signal.SIGKILL)
        if pid in running:
            fault, folder, _ = running.pop(pid)
            yield fault, judge(folder, spent.ru_utime + spent.ru_stime)
            shutil.rmtree(folder)
        time.sleep(0.02)


def import_all_but_the_package() -> None:
    """Import what the package needs, by an engine of it; then forget the package: each copy is imported anew."""
    for name in ("tests.conftest", "tests.warm", "ray"):
        importlib.import_module(name)

    for name in [name for name in sys.modules if name.partition(".")[0] in ("rlr_ray", "tests")]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run", description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="this many only, drawn by the day's date")
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose list, file or reason has it")
    options = parser.parse_args()
    faults = [fault for fault in load() if re.search(options.only, f"{fault.listed} {fault.file} {fault.why}")]
    if options.sample:
        faults = random.Random(datetime.date.today().isoformat()).sample(faults, min(options.sample, len(faults)))
    import_all_but_the_package()
    with tempfile.TemporaryDirectory() as scratch:
        whole, copy = Path(scratch) / "whole", Path(scratch) / "copy"
        whole.mkdir()
        copy.mkdir()
        snapshot(copy)
        every = list(dict.fromkeys(test for fault in faults for test in fault.tests))
        _, _, spent = os.wait4(fork(copy, whole, every, None), 0)
        unplanted = judge(whole, spent.ru_utime + spent.ru_stime)
        if unplanted.verdict != "SURVIVED":
            print((whole / "output").read_text())
            print(f"without a fault the tests must pass: {unplanted.killer or unplanted.verdict}")
            return 1
        print(f"{len(every)} tests pass without a fault, {unplanted.seconds:.0f} CPU s")
        outcomes = []
        for fault, outcome in run_all(faults, Path(scratch)):
            outcomes.append(outcome)
            print(f"{outcome.verdict:9} {outcome.seconds:5.1f} s  {fault.file}: {fault.why}")
            print(f"          {outcome.killer}", flush=True)
    missed = sum(outcome.verdict != "caught" for outcome in outcomes)
    print(f"{len(outcomes) - missed} of {len(outcomes)} faults caught, {sum(o.seconds for o in outcomes):.0f} CPU s")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
