"""Tables and lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 140


def wide_console() -> Console:
    """Wide enough for a table's line where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def table(title: str | None, heads: Sequence[str], *, left: int = 1) -> Table:
    """Without lines; the first `left` columns are words, the others numbers."""
    lines = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        lines.add_column(head, justify="left" if number < left else "right", no_wrap=True)
    return lines
