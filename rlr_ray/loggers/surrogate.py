"""How a surrogate followed the rewards over a run: the columns of an update, the summary of all, and it in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_EXPLAINED, _TRUSTED, _NOISE = "surrogate_explained_", "surrogate_trusted_", "surrogate_noise_"

Row = Mapping[str, Any]
Trusted = tuple[float, bool, float]  # share of variance explained, nan if not known; trusted; the reward's noise in it


def trust_columns(heads: Mapping[str, Trusted]) -> dict[str, float | bool]:
    """Of each reward's head, by the reward's label; what is not known yet is left out."""
    columns: dict[str, float | bool] = {}
    for label, (explained, trusted, noise) in heads.items():
        columns[f"{_TRUSTED}{label}"] = trusted
        if not math.isnan(explained):
            columns |= {f"{_EXPLAINED}{label}": explained, f"{_NOISE}{label}": noise}
    return columns


def explained_columns(rows: Sequence[Row]) -> dict[str, str]:
    """The column of what is explained, by the reward's label."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(_EXPLAINED))
    return {name.removeprefix(_EXPLAINED): name for name in names}


def surrogate_summary(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How it follows the rewards at the end, and the share of updates that used it; None without a surrogate.

    Of one that is switched to, for each reward: the share of variance explained (median of the last quarter), the
    largest, that of the reward's noise, and that of updates that trusted it.
    """
    last = rows[-math.ceil(len(rows) / 4) :]
    if rows and rows[0].get("surrogate_correlation") is not None:
        return {
            "correlation": statistics.median(row["surrogate_correlation"] for row in last),
            "share_of_updates": statistics.mean(row["surrogate_coefficient"] != 0 for row in rows),
        }
    labels = [name.removeprefix(_TRUSTED) for name in (rows[0] if rows else ()) if name.startswith(_TRUSTED)]
    return {"heads": {label: _head(rows, last, label) for label in labels}} if labels else None


def _head(rows: Sequence[Row], last: Sequence[Row], label: str) -> dict[str, float | None]:
    late, ever = (_known(some, f"{_EXPLAINED}{label}") for some in (last, rows))
    noises = _known(rows, f"{_NOISE}{label}")
    return {
        "explained": statistics.median(late) if late else None,
        "most_explained": max(ever, default=None),
        "noise": noises[-1] if noises else None,
        "share_of_updates": statistics.mean(row[f"{_TRUSTED}{label}"] for row in rows),
    }


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def surrogate_words(surrogate: Mapping[str, Any] | None) -> Iterator[str]:
    """Lines for whoever reads how a run ended."""
    if surrogate is None:
        return
    if "heads" not in surrogate:
        yield (
            f"surrogate: correlation {surrogate['correlation']:.2f} with the reward on chains that it had not learned "
            f"from (median of the last quarter), used in {surrogate['share_of_updates']:.0%} of updates"
        )
    for label, head in surrogate.get("heads", {}).items():
        explained = "not measured" if head["explained"] is None else f"{head['explained']:.0%}"
        yield (
            f"surrogate of {label}: explains {explained} of the variance within a prompt on chains that it had not "
            f"learned from (median of the last quarter), trusted in {head['share_of_updates']:.0%} of updates"
        )


def never_trusted(surrogate: Mapping[str, Any] | None) -> Iterator[str]:
    """A warning for each reward whose head never carried it."""
    for label, head in (surrogate or {}).get("heads", {}).items():
        if head["share_of_updates"] or head["most_explained"] is None:
            continue
        noise = f" (the reward's own noise is {head['noise']:.0%} of it)" if head["noise"] else ""
        yield (
            f"the surrogate of {label} was never trusted: it explained at most {max(head['most_explained'], 0):.0%} of "
            f"the reward's variance within a prompt{noise}, so half order carried {label} throughout, at more forwards "
            "for the same gain; train longer, raise estimator.surrogate.steps_per_update, or lower "
            "estimator.surrogate.trust"
        )
