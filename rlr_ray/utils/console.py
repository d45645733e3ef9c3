"""What is shown on a terminal."""

from __future__ import annotations

from rich.console import Console

_WIDTH = 140


def wide_console() -> Console:
    """Wide enough for a table's line where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)
