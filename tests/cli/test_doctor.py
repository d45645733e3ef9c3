"""The doctor's verdicts on machines that are well, and on each thing that may be wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlr_ray.cli import main
from rlr_ray.cluster.machine import MachineReport, examine, judge, left_token
from tests.runs import RECIPE, short_run

WELL = MachineReport("one", {"torch": "2.13.0"}, 1.5, 50.0, 8.0, "", True, True, False, "")
WRONG: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "another torch": ({"versions": {"torch": "2.6.0"}}, "versions", ["one: torch 2.13.0", "two: torch 2.6.0"]),
    "other random numbers": ({"checksum": 1.25}, "random numbers", ["1.5", "1.25"]),
    "a folder that is read-only": ({"unwritable": "Read-only file system"}, "storage", ["two", "Read-only"]),
    "a folder of its own": ({"shares_folder": False}, "storage", ["two", "another folder"]),
    "no folder to start from": ({"starts_there": False}, "start", ["two"]),
    "a full disk": ({"disk_gib": 0.2}, "free disk", ["two 0.2 GiB"]),
    "no memory": ({"memory_gib": 0.5}, "free memory", ["two 0.5 GiB"]),
}


def test_machines_that_are_well(tmp_path: Path) -> None:
    assert all(verdict.ok for verdict in judge(short_run(tmp_path), WELL, [replace(WELL, name="two")]))


@pytest.mark.parametrize(("change", "what", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], what: str, words: list[str]) -> None:
    verdicts = judge(short_run(tmp_path), WELL, [replace(WELL, name="two", **change)])
    wrong = [verdict for verdict in verdicts if not verdict.ok]
    assert [verdict.what for verdict in wrong] == [what] and wrong[0].remedy
    assert [word for word in words if word not in wrong[0].state] == []


def test_this_machine_as_it_sees_itself(tmp_path: Path) -> None:
    with left_token(tmp_path) as token:
        report = examine("one", str(tmp_path), token, str(tmp_path))
        assert report.shares_folder and not report.unwritable and report.disk_gib > 0 and "torch" in report.versions
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "file" in examine("one", str(tmp_path / "file" / "runs"), "token", "/").unwritable


def test_the_command_says_what_it_found_and_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"output_dir": "runs"}))
    assert main(["doctor", "--config", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.count("ok: ") == 7
    Path("file").write_text("")
    assert main(["doctor", "--config", "recipe.yaml", "--set", "output_dir=file/runs"]) == 1
    assert "NOT WELL: storage" in capsys.readouterr().out
