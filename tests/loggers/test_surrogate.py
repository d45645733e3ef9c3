"""What a run says of a surrogate that it switches to."""

from __future__ import annotations

import math
from typing import Any

from rlr_ray.loggers.figures import term_figures
from rlr_ray.loggers.surrogate import never_trusted, surrogate_summary, surrogate_words, trust_columns

EXPLAINED = [math.nan, 0.2, 0.7, 0.6]


def rows(trusted: list[bool]) -> list[dict[str, Any]]:
    """Four updates with two rewards, of which `size` is rated with noise and never explained."""
    columns = [
        trust_columns({"clip": (explained, sure, 0.0), "size": (explained / 10, False, 0.4)})
        for explained, sure in zip(EXPLAINED, trusted, strict=True)
    ]
    return [{"step": step, **of_step} for step, of_step in enumerate(columns)]


def test_it_is_summed_up_drawn_and_said() -> None:
    measured = rows([False, False, True, True])
    assert "surrogate_explained_clip" not in measured[0] and measured[0]["surrogate_trusted_clip"] is False
    summary = surrogate_summary(measured)
    assert summary is not None
    expected = {"explained": 0.6, "most_explained": 0.7, "noise": 0.0, "share_of_updates": 0.5}
    assert summary["heads"]["clip"] == expected
    assert [line[:36] for line in surrogate_words(summary)] == [
        "surrogate of clip: explains 60% of t",
        "surrogate of size: explains 6% of th",
    ]
    (warning,) = never_trusted(summary)
    assert "surrogate of size was never trusted: it explained at most 7% of" in warning and "noise is 40%" in warning
    traces = {trace.name: trace for trace in term_figures(measured)["Variance that the surrogate explains"].data}
    assert list(traces) == ["clip", "size"] and list(traces["clip"].x) == [2, 3, 4]


def test_without_one_nothing_is_said() -> None:
    assert surrogate_summary([]) is None and surrogate_summary([{"step": 0}]) is None
    assert not [*surrogate_words(None), *never_trusted(None)]
    unmeasured = surrogate_summary(rows([False] * 4)[:1])
    assert not list(never_trusted(unmeasured)) and "explains not measured of" in next(surrogate_words(unmeasured))


def test_one_that_shares_the_reward_is_told_as_it_was() -> None:
    told = surrogate_summary([{"surrogate_correlation": c, "surrogate_coefficient": c} for c in (0.0, 0.5, 0.8)])
    assert told == {"correlation": 0.8, "share_of_updates": 2 / 3}
    (line,) = surrogate_words(told)
    assert "correlation 0.80" in line and "used in 67% of updates" in line
