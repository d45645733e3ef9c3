"""Progress of a run: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlr_ray.loggers.surrogate import explained_columns
from rlr_ray.utils.console import progress_bar

if TYPE_CHECKING:
    from rlr_ray.loggers import Report

_PRINT_EVERY_S = 10.0  # where there is no terminal
_SHORT = {"first_order": "FO", "half_order": "HO", "zeroth_order": "ZO"}


@contextmanager
def progress(console: Console, total: int) -> Iterator[Report]:
    """Yields what is to be called with every update's row."""
    first: tuple[int, float] | None = None  # updates done and time at the first report: what came before was start-up
    printed = 0.0

    def report(row: dict[str, Any]) -> None:
        nonlocal first, printed
        done, now = row["step"] + 1, time.monotonic()
        first = first or (done, now)
        bar.update(task, completed=done, text=describe(row))
        if not console.is_terminal and (now - printed > _PRINT_EVERY_S or done == total):
            printed = now
            pace = (now - first[1]) / (done - first[0]) if done > first[0] else row["seconds"]
            text = f"update {done}/{total}  {describe(row)}  about {pace * (total - done):.0f} s left"
            console.print(text, soft_wrap=True)

    with progress_bar(console) as bar:
        task = bar.add_task("update", total=total, text="")
        yield report


def describe(row: dict[str, Any]) -> str:
    """An update in a line: reward, each term's norm and weight, learning rate, rollouts a second."""
    parts = [f"reward {row['reward_mean']:.3f}"]
    if row.get("held_out_reward") is not None:
        parts.append(f"held-out {row['held_out_reward']:.3f}")
    for name, short in _SHORT.items():
        if f"{name}_norm" in row:
            parts.append(f"|{short}| {row[f'{name}_norm']:.2g} x {row[f'{name}_weight']:.2g}")
    if row.get("learning_rate") is not None:
        parts.append(f"rate {row['learning_rate']:.2g}")
    if row.get("stepped_back"):
        parts.append("stepped back")
    if row.get("surrogate_coefficient") is not None:
        parts.append(f"Q correlates {row['surrogate_correlation']:.2f}")
    for label, column in explained_columns([row]).items():
        trusted = "trusted" if row[f"surrogate_trusted_{label}"] else "not trusted"
        parts.append(f"Q explains {row[column]:.0%} of {label}, {trusted}")
    for name, words in (("rollouts_missing", "pairs not waited for"), ("rollouts_rerun", "rollouts run again")):
        if row.get(name):
            parts.append(f"{row[name]} {words}")
    if row["rollouts_per_s"]:
        parts.append(f"{row['rollouts_per_s']:.0f} rollouts/s")
    return "  ".join(parts)
