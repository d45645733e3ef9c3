"""Runs a search with Ray Tune, one budget after the other, and goes on with one that was interrupted."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import ray
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from rlr_ray.cluster.launch import call_in_task, connected, on_worker
from rlr_ray.cluster.resources import bundles_of, missing_of
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.config.tune import TuneConfig, base_values
from rlr_ray.errors import UserError
from rlr_ray.lab.cost import Probe
from rlr_ray.tune.points import Estimates, Points, measured_parts
from rlr_ray.tune.results import Row, filtered_row, row_of
from rlr_ray.tune.searcher import FittingSearch, domain
from rlr_ray.tune.trial import Trial, over_budget

logger = logging.getLogger(__name__)


def search(config: TuneConfig, trial: type[tune.Trainable] = Trial) -> list[Row]:
    """Every point of every budget, those before an interruption included. `trial` runs a point.

    Raises UserError for what a user can mend.
    """
    for name in ("execution.tune_controller", "tune", "logger.logger"):  # Progress tells of trials that fail
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    random.seed(config.seed)  # population based training draws from these two
    numpy.random.seed(config.seed)
    make_private(config.folder / "tune")
    base = parse_config(base_values(config))
    with connected(ClusterConfig() if base.cluster == "none" else base.cluster) as local:
        points = Points(config, Estimates(functools.partial(_measure, config, local)))
        logger.info("measuring what an update of each kind of point needs")
        points.prepare()
        rows: list[Row] = []
        for budget in sorted(config.budgets_gib):
            logger.info(f"searching for {budget:g} GiB: {config.trials} trials")
            earlier, rows = rows, [*rows, *_search(config, base, points, budget, trial, rows)]
            launched = sum(row["trial"] is not None for row in rows[len(earlier) :])
            if launched < config.trials:
                logger.info(f"{budget:g} GiB: only {launched} trials, since no further new point that fits was found")
    return rows


def make_private(folder: Path) -> None:
    """Make the folder of Ray Tune's files and of the searcher's state, which nobody else may write.

    A search that goes on unpickles them, and a pickle runs whatever its writer put into it. Raises UserError for a
    folder of another user's, or one that others may write.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise UserError(
            f"{folder} is another user's or may be written by others, and a search that goes on runs what its files "
            f"say; if you trust them, make it yours alone: chown -R $USER {folder} && chmod -R go-w {folder}"
        )


def _measure(config: TuneConfig, local: bool, run: RunConfig) -> Probe:
    """The parts of a run's updates, in a process like the one that will backpropagate. Raises what it raised."""
    if run.cluster == "none":
        probe: Probe = call_in_task(config.cpus, config.gpus, "DEFAULT", measured_parts, run, {})
    elif run.remote_rewards:
        probe = on_worker(run, run.cluster, measured_parts, local=local)
    else:
        worker = run.cluster.worker
        probe = call_in_task(worker.cpus, worker.gpus, "DEFAULT", measured_parts, run, {})
    return probe


def _search(
    config: TuneConfig,
    base: RunConfig,
    points: Points,
    budget: float,
    trial: type[tune.Trainable],
    before: Sequence[Row],
) -> list[Row]:
    name, storage = f"{budget:g}", config.folder / "tune"
    filtered = storage / f"{name}.filtered.jsonl"
    trainable = tune.with_resources(trial, _bundle(config, base))
    if any((storage / name).glob("experiment_state-*.json")):
        tuner = tune.Tuner.restore(str(storage / name), trainable=trainable, resume_errored=True)
    else:
        shutil.rmtree(storage / name, ignore_errors=True)  # interrupted before it had a trial
        filtered.unlink(missing_ok=True)
        earlier = [(row["point"], row["reward"]) for row in before if row["status"] in ("finished", "stopped early")]
        searcher = FittingSearch(config, points, budget, filtered, earlier)
        population = config.scheduler.name == "pbt"  # which Ray Tune lets no searcher guide
        tuner = tune.Tuner(
            trainable,
            param_space={"launch": tune.grid_search(_all_points(searcher))} if population else {},
            tune_config=tune.TuneConfig(
                search_alg=None if population else searcher,
                scheduler=scheduler_of(config),
                num_samples=1 if population else config.trials,
                max_concurrent_trials=config.concurrent or _concurrent(base),
                trial_dirname_creator=lambda trial: trial.trial_id,
                # a process for one trial after the other, unless it has others of its own, or a GPU's memory, to free
                reuse_actors=base.cluster == "none" and not config.gpus,
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=str(storage), callbacks=[Progress(config, budget)], verbose=0
            ),
        )
    results = tuner.fit()
    launched = {trial.path: trial.config for trial in tune.ExperimentAnalysis(str(storage / name)).trials}
    rows = [row_of(config, budget, (result.config or launched[result.path])["launch"], result) for result in results]
    left_out = filtered.read_text("utf-8").splitlines() if filtered.is_file() else []
    return rows + [filtered_row(budget, json.loads(line)) for line in left_out]


def _all_points(searcher: FittingSearch) -> list[Any]:
    """As many as the search launches, drawn without knowing what came of any."""
    drawn = iter(lambda: searcher.suggest(f"population-{len(searcher.launched)}"), FittingSearch.FINISHED)
    return [suggestion["launch"] for suggestion in drawn]


def _bundle(config: TuneConfig, base: RunConfig) -> tune.PlacementGroupFactory:
    """Of a trial's process. A run on the cluster reserves what it needs itself, and is led from the head."""
    if base.cluster == "none":
        return tune.PlacementGroupFactory([{"CPU": config.cpus, "GPU": config.gpus}])
    return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])  # no CPU, for want of which two could wait


def _concurrent(base: RunConfig) -> int | None:
    """How many whole runs, workers and all actors, the cluster's nodes hold at once; one at the least."""
    if base.cluster == "none":
        return None  # Ray Tune counts these
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actors = base.cluster.rollouts.min_actors if base.needs_actors else 0
    one = [bundle for role in bundles_of(base.cluster, actors, base.remote_rewards) for bundle in role]
    count = 1
    while one and not missing_of(one * (count + 1), nodes):
        count += 1
    return count


def scheduler_of(config: TuneConfig) -> TrialScheduler:
    """By the number of evaluations, between which every trial spends the same."""
    scheduler, last = config.scheduler, config.evaluations
    common: dict[str, Any] = {"time_attr": "evaluation", "metric": "reward", "mode": "max"}
    if scheduler.name == "asha":
        halving = {"grace_period": min(scheduler.grace, last), "reduction_factor": scheduler.reduction_factor}
        return ASHAScheduler(**common, **halving, max_t=last)
    if scheduler.name == "pbt":
        perturbed = {key: values.get("choice") or domain(values) for key, values in config.space.items()}
        common |= {"burn_in_period": scheduler.grace, "perturbation_interval": 1}
        common |= {"hyperparam_mutations": {"launch": {"point": perturbed}}}
        return _Population(**common, custom_explore_fn=functools.partial(_within_bounds, config))
    return FIFOScheduler()


class _Population(PopulationBasedTraining):
    """Ray Tune's, in which a trial that takes over another's weights and keys keeps the folder of its own run."""

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        run = config["launch"]["run"] | {"name": trial.config["launch"]["run"]["name"]}
        return config | {"launch": config["launch"] | {"run": run}}, operations


def _within_bounds(config: TuneConfig, mutated: dict[str, Any]) -> dict[str, Any]:
    point = mutated["launch"]["point"]
    for key, distribution in config.space.items():
        (name, ends), *_ = distribution.items()
        if name != "choice":
            high = ends[1] - (name in ("randint", "lograndint"))  # which never draw the upper one
            point[key] = min(max(point[key], ends[0]), high)
    return mutated


class Progress(Callback):
    """A line for each trial that ends. Ray Tune keeps it with the search, so it holds nothing that cannot be saved."""

    def __init__(self, config: TuneConfig, budget_gib: float):
        self.config, self.budget_gib, self.ended = config, budget_gib, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        at = result["evaluation"]
        stopped = "" if at == self.config.evaluations else f", stopped at {at} of {self.config.evaluations} evaluations"
        self._tell(trial, f"reward {result['reward']:.3g} ± {result['reward_se']:.2g}{stopped}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        over = over_budget(parse_config(trial.config["launch"]["run"]))
        if over is not None:
            self._tell(trial, f"over the budget, {over['peak_gib']:.4g} GiB")
        else:
            self._tell(trial, "failed; results.parquet and report.html will say why")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Ray Tune takes Ctrl-C for a search's end; here it ends all."""
        if sys.exception() is None and any(trial.status not in ("TERMINATED", "ERROR") for trial in trials):
            raise KeyboardInterrupt

    def _tell(self, trial: Any, words: str) -> None:
        self.ended += 1
        values = trial.config["launch"]["point"].items()
        point = ", ".join(f"{key.split('.')[-1]} {_short(value)}" for key, value in values)
        logger.info(f"{self.budget_gib:g} GiB: {self.ended}/{self.config.trials}  {point}: {words}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
