"""A run's numbers over its updates, as points: what figures and tables are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from rlr_ray.rewards.scores import Scores, mean_and_error

Rows = Sequence[Mapping[str, Any]]
Point = tuple[float, float]  # mean and standard error
_HELD_OUT = "held_out_"


def held_out_points(rows: Rows, scores: Mapping[str, Scores], kept: int) -> dict[str, dict[int, Point]]:
    """Held-out means and standard errors: by label, then by number of updates.

    `kept`: updates done where the scores after were measured.
    """
    names = columns(rows, _HELD_OUT)
    means = [name for name in names if not (name.endswith("_se") and name.removesuffix("_se") in names)]
    known: dict[str, dict[int, Point]] = {label: {0: mean_and_error(score.before)} for label, score in scores.items()}
    for name in means:
        label = name.removeprefix(_HELD_OUT)
        for row in rows:
            if row.get(name) is not None:
                known.setdefault(label, {})[row["step"] + 1] = (row[name], row.get(f"{name}_se") or 0.0)
    for label, score in scores.items():
        known[label][kept] = mean_and_error(score.after)
    return {label: dict(sorted(each.items())) for label, each in known.items()}


def likeness_points(rows: Rows, measure: Mapping[str, float], column: str, kept: int) -> dict[int, float]:
    """A measure of pictures by number of updates: at the start, at evaluations, and where the pictures after are of."""
    known = {0: measure["before"]} | points(rows, column) | {kept: measure["after"]}
    return dict(sorted(known.items()))


def points(rows: Rows, column: str) -> dict[int, float]:
    """By number of updates done."""
    return {row["step"] + 1: row[column] for row in rows if row.get(column) is not None}


def spent(rows: Rows) -> dict[str, dict[int, float]]:
    """By unit, then by number of updates: denoiser forwards, a backward as two, and seconds, both of updates alone."""
    steps = [0, *(row["step"] + 1 for row in rows)]
    work = [row.get("denoiser_forwards", 0) + 2 * row.get("denoiser_backwards", 0) for row in rows]
    seconds = [row["seconds"] for row in rows]
    return {
        name: dict(zip(steps, accumulate(each, initial=0.0), strict=True))
        for name, each in (("forwards", work), ("seconds", seconds))
    }


def columns(rows: Rows, start: str, end: str = "") -> list[str]:
    """Names that start and end so, with something between them."""
    names = dict.fromkeys(name for row in rows for name in row)
    shortest = len(start) + len(end)
    return [name for name in names if name.startswith(start) and name.endswith(end) and len(name) > shortest]
