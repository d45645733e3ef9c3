"""Ray Tune's schedulers: which trials go on after an evaluation."""

from __future__ import annotations

import functools
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from rlr_ray.tune.config import TuneConfig
from rlr_ray.tune.space import domain


def scheduler_of(config: TuneConfig) -> TrialScheduler:
    """By the number of evaluations, between which every trial spends the same."""
    given, last = config.scheduler, config.evaluations
    common: dict[str, Any] = {"time_attr": "evaluation", "metric": "reward", "mode": "max"}
    if given.name == "asha":
        halving = {"grace_period": min(given.grace, last), "reduction_factor": given.reduction_factor}
        return ASHAScheduler(**common, **halving, max_t=last)
    if given.name == "pbt":
        perturbed = {key: values.get("choice") or domain(values) for key, values in config.space.items()}
        common |= {"burn_in_period": given.grace, "perturbation_interval": 1}
        common |= {"hyperparam_mutations": {"launch": {"point": perturbed}}}
        return PopulationBasedTraining(**common, custom_explore_fn=functools.partial(_within_bounds, config))
    if given.name == "hyperband":
        return HyperBandScheduler(**common, max_t=last, reduction_factor=given.reduction_factor)
    if given.name == "median":
        return MedianStoppingRule(**common, grace_period=given.grace, min_samples_required=2)
    return FIFOScheduler()


def _within_bounds(config: TuneConfig, mutated: dict[str, Any]) -> dict[str, Any]:
    point = mutated["launch"]["point"]
    for key, given in config.space.items():
        if "choice" not in given:
            low, high = next(iter(given.values()))[:2]
            point[key] = min(max(point[key], low), high)
    return mutated
