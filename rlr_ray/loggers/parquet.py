"""`metrics.parquet`: a row an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.registry import Logger
from rlr_ray.utils.files import replace_file

_GROWTH = 1.1  # of the rows between two writes: all writes of n updates take time for 11 n rows, not for n^2


class Parquet(Logger):
    """Replaces the file whole with every checkpoint, in a long run less often; metrics.jsonl has every row at once."""

    def begin(self, config: RunConfig, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self.file, self.every = folder / "metrics.parquet", config.train.checkpoint_every
        self.rows = list(rows)
        self.due = len(rows) + self.every

    def update(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) >= self.due:
            self._write()

    def end(self, summary: Mapping[str, Any]) -> None:
        self._write()

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in self.rows] for name in names})
        replace_file(self.file, lambda part: pyarrow.parquet.write_table(table, part))
        self.due = max(len(self.rows) + self.every, int(_GROWTH * len(self.rows)))
