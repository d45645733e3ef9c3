"""`metrics.jsonl`: a line an update, appended as it comes: what a resumed run knows of the updates before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlr_ray.utils.files import append_file, replace_file

Row = dict[str, Any]


class Journal:
    """All rows of a run; a checkpoint holds none of them but counts its updates, and so need not grow with them."""

    def __init__(self, file: Path, done: int):
        """Take up the rows of the `done` updates that a checkpoint has seen; later ones are cut off. Raises OSError.

        A line that a kill or a full disk cut short is left out. Of several of one step, which an orphan of a killed
        run may leave, the last one counts.
        """
        self.file, self.waiting = file, b""
        self.rows = [row for row in read_rows(file) if row["step"] < done]
        if file.exists():
            replace_file(file, lambda part: part.write_bytes(b"".join(map(_line, self.rows))))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.waiting += _line(row)

    def write(self) -> None:
        """Have on disk what was added. Raises OSError; then it waits for the next time."""
        append_file(self.file, self.waiting)
        self.waiting = b""


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read_rows(file: Path) -> list[Row]:
    """All rows of a journal in their order, also of a run that goes on."""
    steps = {row["step"]: row for row in _read(file)}
    return [steps[step] for step in sorted(steps)]


def _read(file: Path) -> Iterator[Row]:
    lines = file.read_bytes().splitlines() if file.exists() else []
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)
