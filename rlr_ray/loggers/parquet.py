"""An update's numbers on disk: metrics.parquet, and TensorBoard events."""

from __future__ import annotations

import io
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from rlr_ray.utils.files import replace_file


class MetricsLog:
    """One row an update, kept in memory and in every checkpoint; the files are for people."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        self.file = folder / "metrics.parquet"
        self.rows = rows  # of the updates done
        self.events = Events(folder / "tensorboard", len(rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.events.add(row)

    def save(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in self.rows] for name in names})
        replace_file(self.file, lambda file: pyarrow.parquet.write_table(table, file))


class Events:
    """TensorBoard's file of one process. It only ever grows by whole records, also on a disk that fills up.

    SummaryWriter instead leaves half a record, behind which nothing is read, and fails for good, in a thread.
    """

    def __init__(self, folder: Path, first_step: int):
        self.file = folder / f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self.written = 0  # bytes
        self.waiting = io.BytesIO()
        self._put(Event(file_version="brain.Event:2"))
        # What an earlier part of the run logged of this step and later ones is not shown.
        self._put(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self.waiting).write(event.SerializeToString())

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                self._put(Event(step=row["step"], summary=scalar(name, value)))

    def write(self) -> None:
        """Append what waits. Raises OSError; then it still waits."""
        records = self.waiting.getvalue()
        try:
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("ab") as file:
                file.write(records)
        except OSError as error:
            with suppress(FileNotFoundError):
                os.truncate(self.file, self.written)
            raise OSError(error.errno, error.strerror, str(self.file)) from error
        self.written += len(records)
        self.waiting = io.BytesIO()
