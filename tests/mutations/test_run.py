"""The list of planted faults fits the code, and one that does not is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mutations.run import ROOT, judge, load
from tests.test_floors import FLOORS

ENTRY = "- {file: errors.py, find: %s, replace: x, tests: [a], why: a fault}"


def test_every_fault_can_be_planted_and_names_tests_that_there_are() -> None:
    """Files' names and functions', not parameters."""
    for fault in load():
        for test in fault.tests:
            file, *names = test.split("::")
            text = (ROOT / file).read_text("utf-8")
            assert all(f"def {name.partition('[')[0]}(" in text for name in names), test


def test_there_are_sixty_faults_over_all_floors() -> None:
    faults = load()
    rooms = {fault.file.removesuffix(".py").partition("/")[0] for fault in faults}
    assert len(faults) >= 60 and all(floor & rooms for floor in FLOORS)


@pytest.mark.parametrize("find", ["not there", "e"])
def test_a_fault_whose_text_is_not_there_once_is_refused(tmp_path: Path, find: str) -> None:
    (tmp_path / "some.yaml").write_text(ENTRY % find)
    with pytest.raises(ValueError, match=r"a fault: `find` is .* times in errors.py; allowed: once"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("code", "kinds", "verdict"),
    [
        (0, [], "SURVIVED"),
        (1, ["AssertionError"], "caught"),
        (1, ["ModuleNotFoundError"], "NOT A FAULT (correct the list)"),  # of code that cannot run
        (2, ["SyntaxError"], "NOT A FAULT (correct the list)"),  # nor be collected
        (4, [], "NOT A FAULT (correct the list)"),  # no such test
    ],
)
def test_only_a_test_that_fails_catches_a_fault(tmp_path: Path, code: int, kinds: list[str], verdict: str) -> None:
    (tmp_path / "result").write_text(json.dumps([code, "some test", kinds]))
    assert judge(tmp_path, 1.0).verdict == verdict


def test_a_fault_that_ends_in_nothing_is_not_caught(tmp_path: Path) -> None:
    assert judge(tmp_path, 1.0).verdict.startswith("NO RESULT")
