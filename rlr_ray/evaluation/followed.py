"""Runs' folders as they stand, finished or not, for pages that follow and compare them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from rlr_ray.config.recipe import find_run, run_config
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.evaluation.runs import unique_names
from rlr_ray.loggers.curves import Rows
from rlr_ray.loggers.jsonl import read_rows
from rlr_ray.loggers.shown import FILE, Shown
from rlr_ray.utils.environment import path_of

_READ = ("config.yaml", "metrics.jsonl", "summary.json", FILE)
_LATE = 20  # times as long as updates take: a run that has said nothing for so long may have ended
_LATE_S = 60.0


@dataclass(frozen=True)
class Followed:
    """A run at one moment."""

    name: str  # its folder's, or one by which it is told apart
    folder: Path
    config: RunConfig
    rows: Rows
    shown: Shown | None  # None: its start is not measured yet, or a version ran it that left none
    results: Mapping[str, Any] | None  # summary.json, once it has ended

    @property
    def finished(self) -> bool:
        """Not if it was resumed for more updates."""
        return self.results is not None and len(self.rows) <= self.results["steps"]

    @property
    def summary(self) -> Mapping[str, Any]:
        """All that is known of its results."""
        return self.shown.summary if self.shown else self.results or {}

    @cached_property
    def state(self) -> str:
        """Finished, or how far it is, how long it will take and whether it still says something."""
        done, asked = len(self.rows), self.config.train.iterations
        if self.results is not None and self.finished:
            return f"Finished after {self.results['steps']} updates, on {self.results['ran_on']}."
        if not self.rows:
            return f"No update of {asked} yet" + (
                ": the start is measured." if self.shown else "; the start is not measured yet."
            )
        pace = median(row["seconds"] for row in self.rows[-20:])
        silent = time.time() - (self.folder / "metrics.jsonl").stat().st_mtime
        text = f"Update {done} of {asked}"
        if silent > max(_LATE * pace, _LATE_S):
            return (
                f"{text}; nothing new for {duration(silent)}, where an update took {duration(pace)}. If it has ended, "
                f"`rlr-ray train --resume {self.folder}` goes on with it."
            )
        if done >= asked:
            return f"{text}: its results are being measured and written."
        return f"{text}, {duration(pace)} each: about {duration(pace * (asked - done))} left, evaluations apart."


def read_run(folder: Path, name: str = "") -> Followed:
    """Raises UserError if its recipe cannot be read."""
    results = None
    with suppress(FileNotFoundError):
        results = json.loads((folder / "summary.json").read_text("utf-8"))
    rows = read_rows(folder / "metrics.jsonl")
    return Followed(name or folder.name, folder, run_config(folder, []), rows, Shown.load(folder), results)


def state_of(folders: Sequence[Path]) -> str:
    """What changes when there is something new to read in runs' folders."""
    files = [folder / name for folder in folders for name in _READ]
    return str(
        hash(tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()))
    )


def run_folders(names: Sequence[str], output_dir: str) -> list[Path]:
    """Folders of runs, by the name or path of each, of a search, or of a folder of runs; of none named, output_dir's.

    A search, or a folder of runs, may be empty yet. Raises UserError for what is neither.
    """
    folders: list[Path] = []
    for name in names or ("",):
        places = [path_of(output_dir) / name, path_of(name)] if name else [path_of(output_dir)]
        folder = next((place for place in places if place.is_dir() and not (place / "config.yaml").is_file()), None)
        folders += _within(folder) if folder is not None else [find_run(name, output_dir, "run")]
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def _within(folder: Path) -> list[Path]:
    """Runs in a folder, the oldest first: those of output_dir, or a search's trials."""
    trials = folder / "trials"
    files = (trials if trials.is_dir() else folder).glob("[!.]*/config.yaml")
    return [file.parent for file in sorted(files, key=lambda file: (file.stat().st_ctime, file))]


def read_runs(folders: Sequence[Path]) -> list[Followed]:
    """With names of their own; one that is being written this moment is left out until the next."""
    names = unique_names([folder.name for folder in folders])
    runs = []
    for folder, name in zip(folders, names, strict=True):
        try:
            runs.append(read_run(folder, name))
        except FileNotFoundError:
            continue
        except UserError as error:
            raise UserError(f"the run in {folder} cannot be read: {error}; or name the runs to be shown") from error
    return runs


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
