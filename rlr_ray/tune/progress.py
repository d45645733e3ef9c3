"""What a search says while it runs."""

from __future__ import annotations

import sys
from typing import Any

from ray.tune import Callback

from rlr_ray.recipes import parse_config
from rlr_ray.tune.config import TuneConfig
from rlr_ray.tune.trial import over_budget


class Progress(Callback):
    """A line for each trial that ends. Ray Tune keeps it with the search, so it holds nothing that cannot be saved."""

    def __init__(self, config: TuneConfig, budget_gib: float):
        self.config, self.budget_gib, self.ended = config, budget_gib, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        at = result["evaluation"]
        stopped = "" if at == self.config.evaluations else f", stopped at {at} of {self.config.evaluations} evaluations"
        self._say(trial, f"reward {result['reward']:.3g} ± {result['reward_se']:.2g}{stopped}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        over = over_budget(parse_config(trial.config["launch"]["run"]))
        if over is not None:
            self._say(trial, f"over the budget, {over['peak_gib']:.4g} GiB")
        else:
            self._say(trial, "failed; results.parquet and report.html will say why")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Ray Tune takes Ctrl-C for a search's end; here it ends all."""
        if sys.exception() is None and any(trial.status not in ("TERMINATED", "ERROR") for trial in trials):
            raise KeyboardInterrupt

    def _say(self, trial: Any, words: str) -> None:
        self.ended += 1
        values = trial.config["launch"]["point"].items()
        point = ", ".join(f"{key.split('.')[-1]} {_short(value)}" for key, value in values)
        print(f"{self.budget_gib:g} GiB: {self.ended}/{self.config.trials}  {point}: {words}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
