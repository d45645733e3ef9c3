"""The terminal: one console, which tables, progress and messages share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH = 140


@functools.cache
def wide_console() -> Console:
    """The process's console for standard output; wide enough for a table's line where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def forgive(stream: Any) -> None:
    """Have a stream write what its encoding lacks as an escape: no message ends what it tells of."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def table(title: str | None, heads: Sequence[str], *, left: int = 1) -> Table:
    """Without lines; the first `left` columns are words, the others numbers."""
    lines = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        lines.add_column(head, justify="left" if number < left else "right", no_wrap=True)
    return lines


def progress_bar(console: Console) -> Progress:
    """On a terminal alone; a task has a description and a field `text`."""
    parts = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(24), TextColumn("{task.fields[text]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*parts, *times, console=console, disable=not console.is_terminal)


def messages_on(console: Console) -> AbstractContextManager[None]:
    """Print what rlr_ray logs, from INFO up, until the block ends. Only a command does: a library prints nothing.

    And once: many a reward calls logging.basicConfig, whose handler would print it again.
    """
    return messages_by(_ConsoleHandler(console), propagate=False)


@contextmanager
def messages_by(handler: logging.Handler, *, propagate: bool = True) -> Iterator[None]:
    """Have a handler emit what rlr_ray logs, from INFO up, until the block ends; `propagate`: those of root too."""
    logger = logging.getLogger("rlr_ray")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = propagate and logger.propagate
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, grave = self.format(record), record.levelno >= logging.WARNING
            self.console.print(
                f"{record.levelname.lower()}: {text}" if grave else text,
                style="yellow" if grave else None,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        except Exception:  # as every handler of logging does: a message that cannot be shown ends no run
            self.handleError(record)
