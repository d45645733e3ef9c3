"""The place of a process in a run, which one takes after another: what is printed there, and what crashed there."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.actor import ActorHandle

from rlr_ray.errors import RewardCrashed
from rlr_ray.rewards.own import LIBRARIES
from rlr_ray.utils.console import forgive

_REWARDS = str(Path(__file__).parents[1] / "rewards")
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')  # as faulthandler writes it
_KEPT_S = 24 * 3600.0  # that what is left of a run stays on a node's disk


@dataclass(frozen=True)
class Seat:
    """Of a worker or an actor, whichever process has it now."""

    coordinator: str  # its name: with a handle among an actor's arguments Ray warns that restarts may fail
    name: str = field(default_factory=lambda: uuid4().hex)

    def take(self) -> RewardCrashed | None:
        """Be the process in this place: what it prints reaches the driver, and where it crashes stays on this node.

        Returns the crash of the one before, if that was on this node and in a reward.
        """
        forgive(sys.stdout)
        sys.stdout = _Told(sys.stdout, ray.get_actor(self.coordinator))
        folder = Path(tempfile.gettempdir()) / f"rlr-ray-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        _remove_old(folder)
        file = folder / self.name
        left = file.read_text() if file.exists() else ""
        faulthandler.enable(file.open("w"), all_threads=False)
        return _crash(left)


def _remove_old(folder: Path) -> None:
    for old in folder.iterdir():
        with suppress(FileNotFoundError):  # another process that starts has just removed it
            if old.stat().st_mtime < time.time() - _KEPT_S:
                old.unlink()


def _crash(trace: str) -> RewardCrashed | None:
    """What faulthandler wrote, if the process was in a reward."""
    frames = _FRAME.findall(trace)
    inside = next((depth for depth, frame in enumerate(frames) if frame[0].startswith(_REWARDS)), None)
    if not inside:  # nowhere, or in the package's own line that calls one
        return None
    what = trace.splitlines()[0].removeprefix("Fatal Python error: ")
    theirs = [frame for frame in frames[:inside] if not frame[0].startswith(LIBRARIES)]
    path, line, name = theirs[0] if theirs else frames[inside - 1]
    return RewardCrashed(
        f"a reward crashed its process: {what} ({path}, line {line}, in {name}); it would crash again: "
        "mend the reward, or take another; --resume goes on from the last checkpoint"
    )


class _Told:
    """A stream whose lines reach the driver too."""

    def __init__(self, stream: Any, coordinator: ActorHandle):
        self.stream, self.coordinator, self.line = stream, coordinator, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.coordinator.log.remote((logging.INFO, "rlr_ray.rewards", line))
        written: int = self.stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
