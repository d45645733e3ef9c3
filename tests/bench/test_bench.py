"""Every bench imports and tells what it does; the sweeps' recipes load and cost what their kept runs did."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import yaml

import bench
from bench.common import ROOT, read_rows
from bench.runs.sweep import FILE, load_sweep, missing
from tests.test_floors import imports_of

# The other environment's alone: bench/peers/requirements.txt.
MODULES = {info.name for info in pkgutil.walk_packages(bench.__path__, "bench.")} - {"bench.peers.trl_trainers"}
COMMANDS = sorted(name for name in MODULES if hasattr(importlib.import_module(name), "main"))
SWEEPS = list(yaml.safe_load(FILE.read_text("utf-8")))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bench_tells_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as exit_status:
        module.main()
    assert exit_status.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_s_recipes_load_and_cost_what_kept_runs_did(name: str) -> None:
    """Within one update: some kept runs ended before the one that would have passed the cost."""
    sweep = load_sweep(name)
    for job in next(sweep.stages(list(sweep.variants), sweep.seeds[:1])):
        updates = sweep.updates_of(job)
        rows = [row for row in read_rows(sweep.file) if job.items() <= row.items()]
        assert all(abs(row.get("steps", updates) - updates) <= 1 for row in rows)


def test_a_run_that_has_a_row_is_not_run_again() -> None:
    sweep = load_sweep("length")
    (jobs,) = sweep.stages([""], sweep.seeds)
    assert len(jobs) == 30 and not missing(sweep.file, jobs)
    assert missing(sweep.file, [jobs[0] | {"seed": 5}])


def test_what_runs_on_a_gpu_needs_no_ray() -> None:
    script = (ROOT / "bench" / "speed" / "gpu.sh").read_text("utf-8")
    names = {
        f"bench.speed.{name}" for name in re.findall(r'"(\w+) (?:sd14|sdxl|sd35_medium|flux|digits|tiny_\w+)"', script)
    }
    assert len(names) == 7
    for name in (todo := sorted(names)):  # grows by what they import of the benches
        imported = imports_of(Path(importlib.import_module(name).__file__ or ""))
        assert not any(re.match(r"ray\b|rlr_ray\.(cluster|tune)\b", other) for other in imported), name
        todo += [other for other in imported if other in MODULES and other not in todo]
