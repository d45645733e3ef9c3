"""TensorBoard's events."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.registry import Logger
from rlr_ray.utils.files import append_file


class TensorBoard(Logger):
    """A file of this process, which only ever grows by whole records, also on a disk that fills up.

    SummaryWriter instead leaves half a record, behind which nothing is read, and fails for good, in a thread.
    """

    def begin(self, config: RunConfig, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self.file = folder / "tensorboard" / name
        self.waiting = io.BytesIO()
        self._put(Event(file_version="brain.Event:2"))
        # What an earlier part of the run logged of this step and later ones is not shown.
        first = rows[-1]["step"] + 1 if rows else 0
        self._put(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self.waiting).write(event.SerializeToString())

    def update(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                self._put(Event(step=row["step"], summary=scalar(name, value)))
        self._write()

    def end(self, summary: Mapping[str, Any]) -> None:
        self._write()

    def _write(self) -> None:
        """Append what waits. Raises OSError; then it still waits."""
        self.file.parent.mkdir(exist_ok=True)
        append_file(self.file, self.waiting.getvalue())
        self.waiting = io.BytesIO()
