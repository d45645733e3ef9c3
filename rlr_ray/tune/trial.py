"""What a trial runs: an ordinary run under a memory budget, evaluation by evaluation."""

from __future__ import annotations

import copy
import json
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from rlr_ray.cluster.resources import enter
from rlr_ray.config.recipe import parse_config, put, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import OutOfMemory
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.tune.driver import run_as_driver, run_here
from rlr_ray.tune.points import cost_of_update
from rlr_ray.utils.files import replace_file

_OVER = "over_budget.json"  # in the run's folder


class Trial(tune.Trainable):
    """The run of a point, or the rest of it; a step goes to its next evaluation.

    A class and no function, since Ray Tune waits for `cleanup`, in which a run that is stopped frees what it holds.
    """

    def setup(self, config: dict[str, Any]) -> None:
        launch = config["launch"]
        enter(launch["folder"])
        run = run_of(launch)
        self.checkpoints = RunFolder(run).checkpoints
        self.steps = Stepwise(lambda report: run_trial(run, launch["evaluations"], report))

    def step(self) -> dict[str, Any]:
        result: dict[str, Any] = self.steps.next()
        return result

    def cleanup(self) -> None:
        self.steps.end()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        shutil.copytree(self.checkpoints.folder, checkpoint_dir, dirs_exist_ok=True)
        shutil.copy(self.checkpoints.folder.parent / "metrics.jsonl", checkpoint_dir)  # its rows so far

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from a state of this trial's, or of another's."""
        self.checkpoints.adopt(Path(checkpoint_dir))


def run_trial(config: RunConfig, evaluations: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Report at each evaluation. Raises OutOfMemory, and leaves its peak, if the run needs more than its budget."""
    known, folder = over_budget(config), RunFolder(config)
    if known is not None:
        raise OutOfMemory(known["words"], known["peak_gib"])
    reporter = _Reporter(config, evaluations, report)
    try:
        if not folder.holds_results:  # as it does if an interruption came before Ray Tune knew
            run = run_here if config.cluster == "none" else run_as_driver
            run(config, reporter)
    except OutOfMemory as error:
        # on CUDA the peak is of what it got, and it asked for more
        over = {"peak_gib": max(error.peak_gib, config.memory_budget_gib or 0.0), "words": str(error)}
        folder.path.mkdir(parents=True, exist_ok=True)
        replace_file(folder.path / _OVER, lambda file: file.write_text(json.dumps(over), "utf-8"))
        raise
    reporter.finish(folder.load_summary())


def run_of(launch: dict[str, Any]) -> RunConfig:
    """The run of a launched point, whose keys population based training may have changed."""
    values = copy.deepcopy(launch["run"])
    for key, value in launch["point"].items():
        put(values, key, value)
    return resolve(parse_config(values))


def over_budget(config: RunConfig) -> dict[str, Any] | None:
    """The peak of a run that was over its budget, and what it said."""
    file = config.folder / _OVER
    over: dict[str, Any] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return over


class _Reporter:
    """Makes a result of each update's row that holds a held-out reward, but for the last update's: see `finish`."""

    def __init__(self, config: RunConfig, evaluations: int, report: Callable[[dict[str, Any]], None]):
        self.report = report
        self.every, self.updates, self.evaluations = config.evaluation.every, config.train.iterations, evaluations
        self.cost = cost_of_update(config)
        self.peak: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        self.peak = max(filter(None, (self.peak, row.get("peak_memory_gib"))), default=None)
        updates = row["step"] + 1
        if row.get("held_out_reward") is not None and updates < self.updates:
            assert self.every is not None
            self._report(updates // self.every, updates, row["held_out_reward"], row["held_out_reward_se"])

    def finish(self, summary: dict[str, Any]) -> None:
        self.peak = max(filter(None, (self.peak, summary["peak_memory_gib"])), default=None)
        facts = {name: summary[name] for name in ("gain", "gain_se", "theta_sha256")}
        facts["judge_after"] = next((summary["scores"][judge]["after"] for judge in summary["judges"]), None)
        after = summary["reward_after"], summary["reward_after_se"]
        updates = summary["steps"]  # fewer than were planned if a guard ended the run
        self._report(self.evaluations, updates, *after, facts | {"done": True})

    def _report(
        self, evaluation: int, updates: int, reward: float, error: float, facts: dict[str, Any] | None = None
    ) -> None:
        result = {"evaluation": evaluation, "updates": updates, "cost": updates * self.cost}
        self.report(result | {"reward": reward, "reward_se": error, "peak_gib": self.peak} | (facts or {}))


class _Ended(BaseException):
    """Raised in the work, at its report, so that it unwinds and frees what it holds."""


class Stepwise:
    """Runs `work`, which calls the function that it is given with each result, in a thread that waits in between."""

    def __init__(self, work: Callable[[Callable[[Any], None]], None]):
        self.work = work
        self.results: queue.Queue[Any] = queue.Queue()
        self.wanted = threading.Semaphore(0)
        self.ending = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def next(self) -> Any:
        """The work's next result, None at its end. Raises what the work raised."""
        self.wanted.release()
        if self.thread.ident is None:
            self.thread.start()
        result = self.results.get()
        if self.error is not None:
            raise self.error
        return result

    def end(self) -> None:
        """Give up a work that waits at a report, and wait until it has unwound."""
        self.ending = True
        self.wanted.release()
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            self.work(self._report)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        self.results.put(None)

    def _report(self, result: Any) -> None:
        self.results.put(result)
        self._wait()

    def _wait(self) -> None:
        self.wanted.acquire()
        if self.ending:
            raise _Ended
