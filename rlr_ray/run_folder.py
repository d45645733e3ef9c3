"""A run's folder on disk: config, metrics, checkpoints, adapter, pictures, summary. Every file is replaced whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from rlr_ray.config import RunConfig
from rlr_ray.errors import UserError

# What may change between the parts of a resumed run: none of these changes an update.
_FREE_KEYS = {"cluster", "output_dir", "device", "evaluation.every", "train.iterations"}
_FREE_KEYS |= {"train.checkpoint_every", "train.keep_checkpoints", "memory_budget_gib"}


class RunFolder:
    """Where a run keeps what it must not lose."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.path = config.folder
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise UserError if a run is in the folder that would be lost, or none that could be resumed."""
        there = (self.path / "config.yaml").is_file()
        if resume and not there:
            raise UserError(f"{self.path} holds no run to resume; leave out --resume, or set name and output_dir to it")
        if resume:
            self._check_unchanged()
        elif there and self._checkpoint_steps() and not overwrite:
            raise UserError(
                f"{self.path} already holds a run (checkpoint at update {self._checkpoint_steps()[-1]}); allowed: "
                "--resume to go on with it, --overwrite to start again, or another --set name=..."
            )

    def begin(self, *, resume: bool) -> None:
        """Make the folder; what an earlier run left there goes, unless it is resumed."""
        if not resume and (self.path / "config.yaml").is_file():
            shutil.rmtree(self.path)
        for folder in (self.path, self.checkpoints, self.samples):
            folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        replace_file(self.path / "config.yaml", lambda file: file.write_text(text, "utf-8"))

    def _check_unchanged(self) -> None:
        saved = _flat(yaml.safe_load((self.path / "config.yaml").read_text("utf-8")))
        now = _flat(self.config.model_dump(mode="json"))
        free = lambda key: any(key == name or key.startswith(name + ".") for name in _FREE_KEYS)  # noqa: E731
        changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key) and not free(key)]
        if changed:
            listed = "; ".join(f"{key}: was {saved.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise UserError(
                f"{self.path} was run with another config ({listed}); a resumed run may change only "
                f"{', '.join(sorted(_FREE_KEYS))}; undo the change, or start a new run with another name"
            )

    def _checkpoint_steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("update_")) for path in self.checkpoints.glob("update_*.pt"))

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Save the state after `step` updates; the oldest beyond train.keep_checkpoints go."""
        replace_file(self.checkpoints / f"update_{step:06d}.pt", lambda file: torch.save(state, file))
        for old in self._checkpoint_steps()[: -self.config.train.keep_checkpoints]:
            (self.checkpoints / f"update_{old:06d}.pt").unlink()

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The newest checkpoint's state, or None."""
        steps = self._checkpoint_steps()
        if not steps:
            return None
        path = self.checkpoints / f"update_{steps[-1]:06d}.pt"
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return state

    def save_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2)
        replace_file(self.path / "summary.json", lambda file: file.write_text(text + "\n", "utf-8"))

    def load_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary


class MetricsLog:
    """One row an update, kept in memory, written as metrics.parquet and as TensorBoard events."""

    def __init__(self, folder: Path, first_step: int):
        self.file = folder / "metrics.parquet"
        kept = pyarrow.parquet.read_table(self.file).to_pylist() if self.file.is_file() else []
        self.rows: list[dict[str, Any]] = [row for row in kept if row["step"] < first_step]  # later ones run again
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        for name, value in row.items():
            if isinstance(value, int | float):
                self.events.add_scalar(name, value, row["step"])

    def save(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in self.rows] for name in names})
        replace_file(self.file, lambda file: pyarrow.parquet.write_table(table, file))
        self.events.flush()


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, flush it to disk, then move it there: a reader never meets half a file."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
