"""What a trial runs: an ordinary run under a memory budget, which reports its held-out reward as it goes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ray import tune

from rlr_ray.cluster.folder import enter
from rlr_ray.config import RunConfig
from rlr_ray.disk import replace_file
from rlr_ray.errors import OutOfMemory
from rlr_ray.lock import locked
from rlr_ray.recipes import parse_config, put
from rlr_ray.run_folder import RunFolder
from rlr_ray.start import run
from rlr_ray.tune.estimates import cost_of_update

_OVER = "over_budget.json"  # in the run's folder


def run_trial(config_of_trial: dict[str, Any]) -> None:
    """Run a point, or go on with it. Raises OutOfMemory, and leaves its peak, if it needs more than its budget."""
    given = config_of_trial["launch"]
    enter(given["folder"])
    config = run_of(given)
    folder = RunFolder(config)
    known = over_budget(config)
    if known is not None:
        raise OutOfMemory(known["words"], known["peak_gib"])
    reporter = Reporter(config, folder, keep=given["copied"])
    if folder.holds_results:  # interrupted before Ray Tune knew
        reporter.finish(folder.load_summary())
        return
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:  # another trial's
        with checkpoint.as_directory() as held:
            folder.checkpoints.adopt(Path(held))
    resume = folder.holds_run
    try:
        with locked(config):
            run(config, reporter, lambda text: None, lambda: folder.begin(resume=resume))
    except OutOfMemory as error:
        found = {"peak_gib": error.peak_gib, "words": str(error)}
        folder.path.mkdir(parents=True, exist_ok=True)
        replace_file(folder.path / _OVER, lambda file: file.write_text(json.dumps(found), "utf-8"))
        raise
    reporter.finish(folder.load_summary())


def run_of(given: dict[str, Any]) -> RunConfig:
    """The run of a point, whose keys population based training may have changed."""
    values = copy.deepcopy(given["run"])
    for key, value in given["point"].items():
        put(values, key, value)
    return parse_config(values)


def over_budget(config: RunConfig) -> dict[str, Any] | None:
    """The peak of a run that was over its budget, and what it said."""
    file = Path(config.folder) / _OVER
    found: dict[str, Any] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return found


class Reporter:
    """Gives Ray Tune a result whenever an update's row holds a held-out reward."""

    def __init__(self, config: RunConfig, folder: RunFolder, *, keep: bool):
        self.folder, self.keep = folder, keep  # whether other trials may go on from this one's state
        self.every, self.updates = config.evaluation.every, config.train.iterations
        self.cost = cost_of_update(config)
        self.peak: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        self.peak = max(filter(None, (self.peak, row.get("peak_memory_gib"))), default=None)
        if row.get("held_out_reward") is not None:
            self._report(row["step"] + 1, row["held_out_reward"], row["held_out_reward_se"])

    def finish(self, summary: dict[str, Any]) -> None:
        self.peak = max(filter(None, (self.peak, summary["peak_memory_gib"])), default=None)
        facts = {name: summary[name] for name in ("gain", "gain_se", "judge_after", "theta_sha256")}
        self._report(self.updates, summary["reward_after"], summary["reward_after_se"], facts)

    def _report(self, updates: int, reward: float, error: float, facts: dict[str, Any] | None = None) -> None:
        assert self.every is not None
        result = {"reward": reward, "reward_se": error, "peak_gib": self.peak, "evaluation": updates // self.every}
        checkpoint = tune.Checkpoint.from_directory(self.folder.checkpoints.folder) if self.keep else None
        tune.report(result | {"updates": updates, "cost": updates * self.cost} | (facts or {}), checkpoint=checkpoint)
