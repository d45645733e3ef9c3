"""What the leading process writes while a run goes on, and what becomes of it on a disk that fills up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlr_ray.disk import disk_errors
from rlr_ray.metrics import MetricsLog
from rlr_ray.run_folder import RunFolder


class Recorder:
    """Writes checkpoints and metrics. A write that fails is said once and tried again after every update.

    Until then the earlier checkpoint stays; only at the end of the run is it an error.
    """

    def __init__(self, folder: RunFolder, rows: list[dict[str, Any]], say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.train = folder.config.train
        self.metrics = MetricsLog(folder.path, rows)
        self.behind = False  # something was due and is not on disk
        self.draft: Callable[[list[dict[str, Any]]], None] | None = None  # of a report, likewise

    def add(
        self,
        row: dict[str, Any],
        state: Callable[[], dict[str, Any]],
        draft: Callable[[list[dict[str, Any]]], None] | None = None,
        *,
        last: bool,
    ) -> None:
        """Record an update, the state after it if one is due, and the draft of a report if there is to be one."""
        self.metrics.add(row)
        done = row["step"] + 1
        if last:
            with disk_errors():
                self._write(done, state())
            return
        due = self.behind or done % self.train.checkpoint_every == 0
        try:
            self.draft = draft or self.draft
            self._write(done, state() if due else None)
            if self.draft is not None:
                self.draft(self.metrics.rows)
        except OSError as error:
            if not self.behind:
                self.say(f"could not save: {error}; the run goes on, and tries again after every update")
            self.behind = True
            return
        if self.behind:
            self.say(f"saved again, at update {done}")
        self.behind, self.draft = False, None

    def _write(self, done: int, state: dict[str, Any] | None) -> None:
        try:
            self.metrics.events.write()  # first: events beyond a checkpoint are hidden on resume, missing ones stay so
        finally:
            if state is not None:
                self.folder.checkpoints.save(done, state | {"rows": self.metrics.rows})
                self.metrics.save()
