from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rlr_ray.loggers import terminal as module
from rlr_ray.loggers.terminal import describe, progress


def row(step: int) -> dict[str, Any]:
    terms = {"first_order_norm": 0.5, "first_order_weight": 1.0, "zeroth_order_norm": 0.25, "zeroth_order_weight": 0.3}
    return {"step": step, "reward_mean": -1.5, "rollouts_per_s": 40.0, "seconds": 2.0} | terms


def test_a_row_in_one_line() -> None:
    assert describe(row(0)) == "reward -1.500  |FO| 0.5 x 1  |ZO| 0.25 x 0.3  40 rollouts/s"


def test_what_went_wrong_with_rollouts_is_in_the_line() -> None:
    line = describe(row(0) | {"rollouts_missing": 8, "rollouts_rerun": 16, "rollouts_hedged": 4})
    assert "8 pairs not waited for  16 rollouts run again  40 rollouts/s" in line


def test_time_left_counts_updates_and_not_the_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 104.0, 150.0])  # start-up took 100 s, then 2 s an update, then a pause of 46 s
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    with progress(Console(file=text, width=200), 8) as report:
        for step in (3, 4, 5, 6):  # a resumed run
            report(row(step))
    lines = text.getvalue().strip().splitlines()
    assert [line.split()[1] for line in lines] == ["4/8", "7/8"]  # one in ten seconds
    assert lines[0].endswith("about 8 s left")
    assert lines[1].endswith("about 17 s left")  # 50 s for 3 updates, 1 left
