"""A run's folder on disk: config, metrics, checkpoints, adapter, pictures, summary. Every file is replaced whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlr_ray.checkpoints import FREE_KEYS, Checkpoints, changed_keys
from rlr_ray.config import RunConfig
from rlr_ray.disk import disk_errors, remove_parts, replace_file
from rlr_ray.errors import UserError
from rlr_ray.recipes import read_recipe


class RunFolder:
    """Where a run keeps what it must not lose."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.path = config.folder
        self.checkpoints = Checkpoints(config)
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.yaml").is_file()

    @property
    def holds_results(self) -> bool:
        """Whether it holds a run that went to its end."""
        return (self.path / "summary.json").is_file()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise UserError if a run is in the folder that would be lost, or none that could be resumed."""
        steps = self.checkpoints.steps()
        if resume and not self.holds_run:
            raise UserError(f"{self.path} holds no run to resume; leave out --resume, or set name and output_dir to it")
        if resume:
            self._check_unchanged()
        elif steps and not overwrite:
            raise UserError(
                f"{self.path} already holds a run (checkpoint at update {steps[-1]}); allowed: "
                "--resume to go on with it, --overwrite to start again, or another --set name=..."
            )

    @disk_errors()
    def begin(self, *, resume: bool, leave: Callable[[Path], Any] = lambda folder: None) -> None:
        """Make the folder; what an earlier run left there goes, unless it is resumed.

        `leave` writes what the config was made from, before config.yaml makes the folder a run.
        """
        old = self.path.with_name(f".{self.path.name}.old")
        if old.exists():  # killed while it was deleted
            shutil.rmtree(old)
        if not resume and (self.holds_run or self.checkpoints.steps()):
            self.path.rename(old)  # at once, so that no kill leaves half a run
            shutil.rmtree(old)
        for folder in (self.path, self.checkpoints.folder, self.samples):
            folder.mkdir(parents=True, exist_ok=True)
        remove_parts(self.path)
        leave(self.path)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        replace_file(self.path / "config.yaml", lambda file: file.write_text(text, "utf-8"))

    def _check_unchanged(self) -> None:
        try:
            saved = read_recipe(str(self.path / "config.yaml"))
        except UserError:  # damaged: `begin` writes it anew, and every checkpoint holds the config too
            return
        changed = changed_keys(saved, self.config)
        if changed:
            raise UserError(
                f"{self.path} was run with another config ({'; '.join(changed)}); a resumed run may change only "
                f"{', '.join(sorted(FREE_KEYS))}; undo the change, or start a new run with another name"
            )

    def save_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2)
        replace_file(self.path / "summary.json", lambda file: file.write_text(text + "\n", "utf-8"))

    def load_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary
