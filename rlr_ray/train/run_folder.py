"""A run's folder on disk: config, metrics, checkpoints, adapter, pictures, summary. Every file is replaced whole."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from rlr_ray.config.base import free_keys
from rlr_ray.config.recipe import read_recipe
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.loggers.jsonl import Journal
from rlr_ray.loggers.registry import LOGGERS, Loggers
from rlr_ray.train.checkpoints import Checkpoints, changed_keys
from rlr_ray.train.contents import contents_of
from rlr_ray.utils.files import PARTS, disk_errors, make_folder, refuse_foreign, remove_parts, replace_file

_OWN = (  # all that a run, its loggers, `evaluate` and `sample` write into its folder
    *(
        "config.yaml",
        "contents.json",
        "plan.*",
        "metrics.*",
        "summary.json",
        "report.*",
        "reward_curve.png",
        "over_budget.json",
    ),
    *(f"{name}/*" for name in ("samples", "chains", "lora", "adapter", "evaluate", "sample", "trackers", *LOGGERS)),
    *("checkpoints/update_[0-9]*.pt", PARTS, f"*/{PARTS}"),
)
_BEFORE = ("checkpoints", "samples", "plan.yaml", "plan.json")  # in a run's folder before config.yaml

logger = logging.getLogger(__name__)


class RunFolder:
    """The files of a run that it must not lose."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.path = config.folder
        self.checkpoints = Checkpoints(config)
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun, though its config may be lost: every checkpoint holds it too."""
        return (self.path / "config.yaml").is_file() or bool(self.checkpoints.steps())

    @property
    def holds_results(self) -> bool:
        """Whether it holds a run that went to its end."""
        return (self.path / "summary.json").is_file()

    def check(self, *, resume: bool, overwrite: bool, accept_changes: bool = False) -> None:
        """Raise UserError if a run is in the folder that would be lost, or none that could be resumed.

        `accept_changes`: a run whose prompts, reward modules or weights have changed may be resumed all the same.
        """
        steps = self.checkpoints.steps()
        if resume and not self.holds_run:
            raise UserError(f"{self.path} holds no run to resume; leave out --resume, or set name and output_dir to it")
        iterations = self.config.train.iterations
        if resume and steps and iterations < steps[-1]:
            raise UserError(
                f"{self.path} has done {steps[-1]} updates, and train.iterations is {iterations}; allowed: {steps[-1]} "
                "or more; raise it, or start a new run with another name"
            )
        if resume:
            self._check_unchanged()
            if not accept_changes:
                self._check_contents()
        elif not steps and not (self.holds_run and self.checkpoints.folder.is_dir()):
            refuse_foreign(self.path, "run", _BEFORE)
        elif steps and not overwrite:
            raise UserError(
                f"{self.path} already holds a run (checkpoint at update {steps[-1]}); allowed: "
                "--resume to go on with it, --overwrite to start again, or another --set name=..."
            )
        else:
            self._check_only_own()

    def _check_only_own(self) -> None:
        """Raise UserError if files would be deleted that no run wrote."""
        files = [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir()]
        others = sorted(name for name in files if not any(fnmatchcase(name, pattern) for pattern in _OWN))
        if others:
            shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            raise UserError(
                f"{self.path} holds a run, and files that no run wrote: {shown}; they would be deleted with it: move "
                "them away, or start another run with --set name=..."
            )

    def _check_contents(self) -> None:
        if (self.path / "contents.json").is_file() and not self._accepted():
            raise UserError(
                f"{self.path / 'contents.json'} is damaged, so nobody knows whether prompts, rewards or weights are "
                "those that the run was begun with; put it back from a backup, or add --accept-changes, which takes "
                "what there is now"
            )
        changed = self._changed_contents(contents_of(self.config))
        if changed:
            raise UserError(
                f"{self.path} was begun with other contents of {', '.join(changed)}, whose scores would be compared "
                "with today's; put the old ones back, start a new run with --set name=..., or add --accept-changes, "
                "which measures the base model again with what there is now"
            )

    def _changed_contents(self, now: dict[str, str]) -> list[str]:
        """Names of contents that differ from those begun with or last accepted; none in an earlier version's run."""
        before = self.contents
        return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])

    @property
    def contents(self) -> dict[str, str]:
        """Digests of what the run is made of; see `contents_of`."""
        return self._accepted().get("contents", {})

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Changes of the contents that were accepted: after which update, and of what."""
        return self._accepted().get("changes", [])

    def _accepted(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # of an earlier version, or damaged; see _check_contents
            accepted: dict[str, Any] = json.loads((self.path / "contents.json").read_text("utf-8"))
            return accepted
        return {}

    def _note_contents(self) -> None:
        now, changes = contents_of(self.config), self.changes
        changed = self._changed_contents(now)
        if changed:
            changes = [*changes, {"update": max(self.checkpoints.steps(), default=0), "what": changed}]
        text = json.dumps({"contents": now, "changes": changes}, indent=2)
        replace_file(self.path / "contents.json", lambda file: file.write_text(text + "\n", "utf-8"))

    @disk_errors()
    def begin(self, *, resume: bool, leave: Callable[[Path], Any] = lambda folder: None) -> None:
        """Make the folder; what an earlier run left there goes, unless it is resumed.

        What its contents are now is noted as accepted; see `check`. `leave` writes what the config was made from,
        before config.yaml makes the folder a run.
        """
        anew = not resume and self.holds_run
        if anew:
            self._check_only_own()
        make_folder(self.path, anew=anew)
        for folder in (self.checkpoints.folder, self.samples):
            folder.mkdir(exist_ok=True)
        remove_parts(self.path)
        self._note_contents()
        leave(self.path)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        replace_file(self.path / "config.yaml", lambda file: file.write_text(text, "utf-8"))

    def _check_unchanged(self) -> None:
        try:
            saved = read_recipe(str(self.path / "config.yaml"))
        except UserError:  # damaged or lost: `begin` writes it anew
            return
        changed = changed_keys(saved, self.config)
        if changed:
            raise UserError(
                f"{self.path} was run with another config ({'; '.join(changed)}); a resumed run may change only "
                f"{', '.join(free_keys(RunConfig))}; undo the change, or start a new run with another name"
            )

    def save_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2)
        replace_file(self.path / "summary.json", lambda file: file.write_text(text + "\n", "utf-8"))

    def load_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary


@contextmanager
def locked(folder: Path, kind: str = "run") -> Iterator[None]:
    """Keep every other process from the run or search in a folder until the block ends. Raises UserError if one has it.

    The lock lies beside the folder, so that it outlives what is overwritten.
    """
    folder = folder.resolve()  # one lock, by whichever links it is reached
    file, holder = (folder.with_name(f".{folder.name}.{end}") for end in ("lock", "holder"))
    lock = FileLock(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        me = {"process": os.getpid(), "host": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        replace_file(holder, lambda part: part.write_text(json.dumps(me), "utf-8"))
    except Timeout:
        raise UserError(
            f"the {kind} {folder} is held by {_told(holder)}; wait for it or end it, or start another {kind} with "
            "--set name=..."
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(
            f"the {kind} {folder} could not be locked: {error}; make room in {folder.parent}, or set output_dir to a "
            "folder that you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _told(holder: Path) -> str:
    try:
        other = json.loads(holder.read_text("utf-8"))
    except OSError:  # it has the lock and is about to say so
        return "another process"
    return f"process {other['process']} on {other['host']} since {other['since']}"


class Recorder:
    """Writes the rows of updates and checkpoints, and tells the loggers.

    A write that fails is logged once and tried again after every update. Until then the earlier checkpoint stays; only
    at the end of the run is it an error.
    """

    @disk_errors()
    def __init__(self, folder: RunFolder, done: int):
        """`done`: updates that the checkpoint has seen with which the run goes on."""
        self.folder, self.every = folder, folder.config.train.checkpoint_every
        self.journal = Journal(folder.path / "metrics.jsonl", done)
        self.rows = self.journal.rows
        if len(self.rows) < done:
            lost = f"{done - len(self.rows)} of {done} updates are not in {self.journal.file}"
            logger.warning(f"{lost}; the run goes on, its report and sums lack them")
        self.loggers = Loggers(folder.config, self.rows)
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
        self.journal.add(row)
        self.loggers.update(row)  # first: TensorBoard hides on resume what is beyond a checkpoint; gaps would stay
        done = row["step"] + 1
        if last:
            with disk_errors():
                self._write(done, state())
            return
        due = self.behind or done % self.every == 0
        try:
            self.draft = draft or self.draft
            self._write(done, state() if due else None)
            if self.draft is not None:
                self.draft(self.rows)
        except OSError as error:
            if not self.behind:
                logger.warning(f"could not save: {error}; the run goes on, and tries again after every update")
            self.behind = True
            return
        if self.behind:
            logger.info(f"saved again, at update {done}")
        self.behind, self.draft = False, None

    @disk_errors()
    def save(self, done: int, state: dict[str, Any]) -> None:
        """Save the state before it is due."""
        self._write(done, state)

    def _write(self, done: int, state: dict[str, Any] | None) -> None:
        self.journal.write()  # first: a checkpoint counts on the rows before it
        if state is not None:
            self.folder.checkpoints.save(done, state)
