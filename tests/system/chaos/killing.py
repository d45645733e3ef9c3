"""A run as a process tree of its own, whose members can be found and killed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from rlr_ray.config.estimator import merge
from tests.runs import RECIPE

ROOT = Path(__file__).parent.parent.parent.parent
Kind = Literal["actor", "worker", "driver", "everything"]
KINDS: tuple[Kind, ...] = ("actor", "worker", "driver", "everything")
CHECKPOINT_EVERY = 2  # updates
_COMMANDS = {"actor": "ray::RolloutActor", "worker": "ray::RayTrainWorker"}  # as `ps` shows them
_ENOUGH = 20  # times that a run is started again


# What actors do: pairs beside the other orders' chains, or nothing but chains; and how many times the updates, so that
# a run lasts until it is killed.
PLANS: dict[str, tuple[dict[str, Any], int]] = {"all orders": ({}, 1), "forward term": ({"preset": "awm"}, 4)}


def chaos_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A short run of the embedded model on Ray, every update of which writes half of a checkpoint's worth."""
    parts: dict[str, Any] = {  # small chunks, so that an update takes long enough for a kill to fall into it
        "train": {"iterations": 12, "checkpoint_every": CHECKPOINT_EVERY, "chunk_size": 2},
        "estimator": {"zeroth_order": {"chunk_size": 2}},
    }
    cluster = {"worker": {"cpus": 0.5}, "rollouts": {"cpus": 0.25, "min_actors": 2}, "max_failures": 5}
    return merge(RECIPE | {"output_dir": str(folder), "cluster": cluster}, merge(parts, changes))


def planned(folder: Path, plan: str, **changes: Any) -> dict[str, Any]:
    """A chaos recipe with one of PLANS in place of its estimator, unless that is empty, and as many updates."""
    recipe, (estimator, times) = chaos_recipe(folder, **changes), PLANS[plan]
    train = recipe["train"] | {"iterations": times * recipe["train"]["iterations"]}
    return recipe | {"train": train} | ({"estimator": estimator} if estimator else {})


class Run:
    """Starts a recipe's run, starts it again after a kill, and reads what it says."""

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        self.folder = folder / recipe["name"]
        self.file, self.log = folder / "recipe.yaml", folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(yaml.safe_dump(recipe))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(self.file), "--resume-or-start"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=environment | {"PYTHONPATH": str(ROOT)},
                cwd=self.file.parent,  # where a run finds a reward of its own
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def tree(self) -> list[psutil.Process]:
        """The driver's children, theirs, and so on."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find(self, kind: Kind) -> list[psutil.Process]:
        """The processes that a kill of this kind would end; none if there is no such one at present."""
        assert self.process is not None
        if self.process.poll() is not None:
            return []
        driver = psutil.Process(self.process.pid)
        if kind == "driver":
            return [driver]
        if kind == "everything":
            return [driver, *self.tree]
        found = [process for process in self.tree if _COMMANDS[kind] in _command(process)]
        return found[:1]

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_for(self, kind: Kind) -> None:
        """Until there is such a process."""
        while not self.find(kind):
            assert self.process is not None and self.process.poll() is None, self.said()
            time.sleep(0.05)

    def finish(self) -> int:
        """Wait for the end; start again, as an operator or a job's supervisor would, until it went well. How often."""
        for starts in range(_ENOUGH):
            assert self.process is not None
            if self.process.wait() == 0:
                return starts
            self.start()
        raise AssertionError(f"it did not finish in {_ENOUGH} starts: {self.said()}")

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def newest_checkpoint(self) -> int:
        """Updates in the newest checkpoint; 0 without one."""
        found = (re.fullmatch(r"update_(\d+)", path.stem) for path in (self.folder / "checkpoints").glob("*.pt"))
        return max((int(match[1]) for match in found if match), default=0)

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass(frozen=True)
class Trial:
    """What came of a run with one kill in it."""

    kind: Kind
    seed: int
    killed_after_s: float  # since there was something to kill
    checkpoint_at_kill: int  # updates
    resumed_at: int | None  # the first update after the kill; None: it went on without a break
    starts: int  # beside the first one
    restarts: int  # of the training workers, which a resumed run's first start is not
    theta_sha256: str
    checkpointed: bool = False  # the kill waited for a checkpoint


def trial(
    folder: Path, kind: Kind, seed: int, span_s: float, *, checkpointed: bool = False, plan: str = "all orders"
) -> Trial | None:
    """Kill at a random moment within `span_s`, let the run finish. None if it was over before.

    The span begins when there is something to kill; `checkpointed`: when there also is a checkpoint, a random one.
    """
    run, chance = Run(folder, planned(folder, plan)), random.Random(f"{kind}/{seed}")
    moment, awaited = chance.uniform(0, span_s), chance.randrange(CHECKPOINT_EVERY, 10, CHECKPOINT_EVERY)
    run.start()
    run.wait_for(kind)
    while checkpointed and run.newest_checkpoint() < awaited and run.running:
        time.sleep(0.05)
    time.sleep(moment)
    victims, checkpoint, said = run.find(kind), run.newest_checkpoint(), len(run.said())
    if not victims:
        run.finish()
        return None
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    starts = run.finish()
    resumed = re.search(r"going on from update (\d+)", run.said()[said:])
    first = int(resumed[1]) if resumed else None
    restarts = len(re.findall(r"training on \d+ worker", run.said()[said:])) - starts
    sha = run.summary()["theta_sha256"]
    return Trial(kind, seed, moment, checkpoint, first, starts, restarts, sha, checkpointed)


def lost(trial: Trial) -> int:
    """Updates of the newest checkpoint at the kill that were run again, though it should have held them."""
    went_on = not trial.starts and not trial.restarts
    return 0 if went_on else trial.checkpoint_at_kill - (trial.resumed_at or 0)
