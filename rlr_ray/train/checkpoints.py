"""Checkpoints: all that an update depends on, of the newest updates; one that is damaged is passed over."""

from __future__ import annotations

import logging
import platform
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rlr_ray.config.base import flat, is_free
from rlr_ray.config.recipe import as_now, parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.utils.files import Unreadable, load_sealed, save_sealed

logger = logging.getLogger(__name__)

_SHOWN_S = 60.0  # that a network disk may take to show a file: as long as NFS keeps the attributes of a folder
_FORMAT = 6  # of what a checkpoint holds; raise it when a key comes, goes or means something else


class Checkpoints:
    """The newest of a run's states, one a file."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = config.folder / "checkpoints"

    def steps(self) -> list[int]:
        """After how many updates each was saved, the oldest first."""
        return steps_in(self.folder)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save the state after `step` updates; the oldest beyond train.keep_checkpoints go.

        Later ones stay: they were passed over when the run was resumed, or an orphan of a killed run wrote them.
        """
        whose = {"format": _FORMAT, "config": self.config.model_dump(mode="json")}
        save_sealed(self._file(step), whose | state)
        for old in [at for at in self.steps() if at <= step][: -self.config.train.keep_checkpoints]:
            self._file(old).unlink(missing_ok=True)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest state that is whole and of this run; None if nothing was saved yet.

        Logs which it passes over and why. Raises UserError if it passes over all of them.
        """
        passed: list[str] = []
        for step in reversed(self.steps()):
            file = self._file(step)
            try:
                state = self._read(file, device)
            except Unreadable as error:
                passed.append(f"{file} {error}")
                continue
            for text in passed:
                logger.warning(f"checkpoint {text}; going on from {file.name} instead")
            return state
        if passed:
            raise UserError(
                f"no checkpoint of the run can be used: {'; '.join(passed)}; put one back from a backup, or start the "
                "run again with --overwrite"
            )
        return None

    def load_at(self, step: int, device: torch.device, wait_s: float = _SHOWN_S) -> dict[str, Any]:
        """The state after `step` updates, which a process elsewhere has found.

        Waits for a network disk to show it here. Raises UserError if it cannot be read within `wait_s`.
        """
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return self._read(self._file(step), device)
            except Unreadable as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the leading worker found the run at update {step}, but {self._file(step)} {error} on "
                        f"{platform.node()}; workers on several nodes need output_dir on a disk that all of them share"
                    ) from error
                time.sleep(1.0)

    def adopt(self, folder: Path) -> None:
        """Go on from the newest state in the folder, whatever run it is of; what was saved here goes.

        So does config.yaml, which may hold other keys; `RunFolder.begin` writes it anew.
        """
        newest = steps_in(folder)[-1]
        shutil.copyfile(folder / "metrics.jsonl", self.folder.parent / "metrics.jsonl")
        state = load_state(folder / _name(newest), torch.device("cpu"))
        for step in self.steps():
            self._file(step).unlink()
        (self.folder.parent / "config.yaml").unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(state["step"], {name: value for name, value in state.items() if name not in ("format", "config")})

    def _file(self, step: int) -> Path:
        return self.folder / _name(step)

    def _read(self, file: Path, device: torch.device) -> dict[str, Any]:
        state = load_state(file, device)
        changed = changed_keys(state["config"], self.config)
        if changed:
            raise Unreadable(f"is of another config ({'; '.join(changed)})")
        return state


def load_state(file: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint's state, whatever run it is of. Raises Unreadable if it is damaged, or none that is read here."""
    state: dict[str, Any] = load_sealed(file, device)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        version = state.get("format") if isinstance(state, dict) else None
        raise Unreadable(f"has format {version}, this version of rlr_ray reads format {_FORMAT}")
    return state


def _name(step: int) -> str:
    return f"update_{step:06d}.pt"


def steps_in(folder: Path) -> list[int]:
    """After how many updates the states in a folder were saved, the oldest first; files of other names are not ours."""
    names = (path.name.removeprefix("update_").removesuffix(".pt") for path in folder.glob("update_*.pt"))
    return sorted(int(name) for name in names if name.isdecimal())


def changed_keys(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """The keys by which a config's updates differ from those of the saved one, with both values."""
    with suppress(UserError):  # keys that came since then have what they have by default
        saved = parse_config(as_now(saved)).model_dump(mode="json")
    was, now = flat(saved), flat(config.model_dump(mode="json"))
    changed = [path for path in sorted(was.keys() | now.keys()) if was.get(path) != now.get(path)]
    changed = [path for path in changed if not is_free(RunConfig, path)]
    return [f"{'.'.join(path)}: was {was.get(path)!r}, now {now.get(path)!r}" for path in changed]
