"""What a person sees while a run goes on: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlr_ray.loop import Report

_SHORT = {"first_order": "FO", "half_order": "HO", "zeroth_order": "ZO"}


@contextmanager
def progress(console: Console, total: int) -> Iterator[Report]:
    """Yields what is to be called with every update's row."""
    bar = Progress(
        TextColumn("update"),
        MofNCompleteColumn(),
        BarColumn(24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    started, first, printed = time.monotonic(), None, 0.0

    def report(row: dict[str, Any]) -> None:
        nonlocal first, printed
        done = row["step"] + 1
        first = row["step"] if first is None else first
        bar.update(task, completed=done, text=describe(row))
        now = time.monotonic()
        if not console.is_terminal and (now - printed > 10 or done == total):
            printed = now
            left = (now - started) / max(done - first, 1) * (total - done)
            console.print(f"update {done}/{total}  {describe(row)}  about {left:.0f} s left", soft_wrap=True)

    with bar:
        task = bar.add_task("train", total=total, text="")
        yield report


def describe(row: dict[str, Any]) -> str:
    """One update in one line: reward, each term's norm and weight, rollouts a second."""
    parts = [f"reward {row['reward_mean']:.3f}"]
    if row.get("held_out_reward") is not None:
        parts.append(f"held-out {row['held_out_reward']:.3f}")
    for name, short in _SHORT.items():
        if f"{name}_norm" in row:
            parts.append(f"|{short}| {row[f'{name}_norm']:.2g} x {row[f'{name}_weight']:.2f}")
    if row["rollouts_per_s"]:
        parts.append(f"{row['rollouts_per_s']:.0f} rollouts/s")
    return "  ".join(parts)
