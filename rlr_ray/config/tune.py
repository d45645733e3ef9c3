"""The config of a search: `tune_configs/*.yaml`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlr_ray.config.base import Strict, numeric
from rlr_ray.config.recipe import checked, put, read_recipe, split_override
from rlr_ray.errors import UserError
from rlr_ray.utils.environment import path_of

# Ray Tune's distributions that Optuna can draw from, by name: how many numbers each takes
_NUMBERS = {"uniform": 2, "quniform": 3, "loguniform": 2, "randint": 2, "qrandint": 3, "lograndint": 2}
_OWN = (  # keys of the recipe that a search sets
    "name",
    "output_dir",
    "memory_budget_gib",
    "train.iterations",
    "train.checkpoint_every",
    "evaluation.every",
)
Distribution = dict[str, list[Any]]  # one entry, e.g. {loguniform: [0.001, 0.1]}


class CostConfig(Strict):
    """The budget of a trial, which runs as many updates as that allows."""

    denoiser_forwards: float | None = Field(None, gt=0)  # a backward counts as two
    seconds: float | None = Field(None, gt=0)  # of one process, as predicted from a measured update's parts

    @model_validator(mode="after")
    def _one(self) -> CostConfig:
        if (self.denoiser_forwards is None) == (self.seconds is None):
            raise ValueError("allowed: one of denoiser_forwards and seconds")
        return self


class SchedulerConfig(Strict):
    """The rule by which trials go on after each evaluation.

    pbt ends none: a bad trial goes on from a good one's state with that one's keys, perturbed, which gives schedules.
    """

    name: Literal["none", "asha", "pbt"] = "asha"
    grace: int = Field(1, ge=1)  # evaluations that every trial gets before
    reduction_factor: float = Field(3, gt=1)  # of asha: one in so many goes on


class TuneConfig(Strict):
    name: str = Field(pattern=r"^\w[\w.-]*$")
    output_dir: str = "runs"
    seed: int = 0
    base: str  # a recipe, by its path from this file
    set: dict[str, Any] = Field(default_factory=dict)  # keys on top of it, e.g. {train.chains: 40}
    space: dict[str, Distribution] = Field(min_length=1)  # by key, e.g. {train.chains: {choice: [40, 80]}}
    budgets_gib: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)  # of memory, one search each
    trials: int = Field(16, ge=1)  # that run, for each budget; of a grid every point, unless it is set
    cost: CostConfig  # of a trial that goes on to its end
    evaluations: int = Field(4, ge=1)  # of the held-out reward in a trial, evenly over its cost
    searcher: Literal["random", "tpe", "nsga2", "grid"] = "tpe"  # nsga2: reward against memory
    scheduler: SchedulerConfig = SchedulerConfig()
    concurrent: int | None = Field(None, ge=1)  # trials; None: as many as there is room for
    cpus: float = Field(1, gt=0)  # of a trial whose recipe has `cluster: none`
    gpus: float = Field(0, ge=0)

    @field_validator("space", mode="before")
    @classmethod
    def _known(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        return {key: _distribution(key, distribution) for key, distribution in space.items()}

    @property
    def folder(self) -> Path:
        return path_of(self.output_dir).absolute() / self.name


def _distribution(key: str, distribution: Any) -> Any:
    """The distribution with numbers for texts like 1e-4. Raises ValueError for one that Optuna cannot draw from."""
    if key in _OWN or key.split(".")[0] == "cluster":
        raise ValueError(f"{key} cannot be searched over, a search sets it; see cost, evaluations and budgets_gib")
    names = ("choice", *_NUMBERS)
    if not isinstance(distribution, dict) or len(distribution) != 1 or next(iter(distribution)) not in names:
        raise ValueError(
            f"{key}: found {distribution!r}; allowed: one of {', '.join(names)}, e.g. {{loguniform: [0.001, 0.1]}}"
        )
    (name, arguments), *_ = distribution.items()
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{key}: {name} has {arguments!r}; allowed: a list")
    if name == "choice":
        return distribution
    arguments = [numeric(value) for value in arguments]
    kind, words = (int, "whole numbers") if name.endswith("randint") else (int | float, "numbers")
    numbers = [value for value in arguments if isinstance(value, kind) and not isinstance(value, bool)]
    if len(numbers) != len(arguments) or len(numbers) != _NUMBERS[name] or numbers[0] >= numbers[1]:
        raise ValueError(f"{key}: {name} has {arguments!r}; allowed: {_NUMBERS[name]} {words}, lower before upper")
    for step in numbers[2:]:
        if step <= 0 or not all(math.isclose(end / step, round(end / step)) for end in numbers[:2]):
            raise ValueError(f"{key}: {name} has {arguments!r}; allowed: a step above 0 that divides both bounds")
    if name.startswith("log") and numbers[0] <= 0:
        raise ValueError(f"{key}: {name} has {arguments!r}; allowed: numbers above 0")
    return {name: arguments}


def load_tune_config(path: str, overrides: list[str]) -> TuneConfig:
    """Read a search's YAML. Raises UserError naming every bad key."""
    values = read_recipe(path)
    for text in overrides:
        key, value = split_override(text)
        section, _, rest = key.partition(".")
        if section in ("set", "space") and rest and isinstance(values.setdefault(section, {}), dict):
            values[section][rest] = value  # under one key with its dots, as the file has it: beside what is there
        else:
            put(values, key, value)
    config = checked(TuneConfig, values)
    if config.searcher == "grid":
        if any("choice" not in distribution for distribution in config.space.values()):
            raise UserError("searcher is 'grid', which tries every point of a space; allowed: `choice` for every key")
        if "trials" not in config.model_fields_set:
            count = math.prod(len(distribution["choice"]) for distribution in config.space.values())
            config = config.model_copy(update={"trials": count})
    return config.model_copy(update={"base": str(Path(path).parent / config.base)})


def base_values(config: TuneConfig) -> dict[str, Any]:
    """The base recipe's keys with the search's own on top, unchecked."""
    values = read_recipe(config.base)
    for key, value in config.set.items():
        put(values, key, value)
    return values
