"""The runs that are evaluated, and the recipe that they are evaluated by."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlr_ray.config.base import read_yaml
from rlr_ray.config.model import ModelConfig
from rlr_ray.config.recipe import find_run, load_config, output_dir_of, parse_config, run_config
from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import seed_of
from rlr_ray.errors import UserError
from rlr_ray.lab.plans import NEUTRAL
from rlr_ray.train.run_folder import RunFolder

BASE = "base"  # the base model among runs: in tables, files and folders of videos
_ALIKE = ("model", "sampler", "dcot")  # keys without which the same seed does not mean the same picture


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str
    folder: Path
    config: RunConfig  # its own


def finished_run(name: str, overrides: list[str]) -> Run:
    """The run of this name or path. Raises UserError if there is none, or if it has not ended."""
    folder = find_run(name, output_dir_of(overrides), "run")
    config = run_config(folder, [])
    if not RunFolder(config).holds_results:
        raise UserError(
            f"run {name!r} in {folder} has not ended, and leaves its adapter when it does; go on with it by "
            f"`rlr-ray train --resume {name}`"
        )
    return Run(folder.name, folder, config)


def finished_runs(names: Sequence[str], overrides: list[str]) -> list[Run]:
    """Runs with names of their own. Raises UserError if one is named twice."""
    runs: list[Run] = []
    for text in names:
        run = finished_run(text, overrides)
        if any(other.folder.samefile(run.folder) for other in runs):
            raise UserError(f"run {text!r} is the one in {run.folder}, which was named before; name it once")
        runs.append(run)
    unique = unique_names([run.name for run in runs])
    return [replace(run, name=name) for run, name in zip(runs, unique, strict=True)]


def unique_names(names: Sequence[str]) -> list[str]:
    """Names by which results are told apart: where one is taken, by BASE too, `name-2` or the next that nobody has."""
    unique: list[str] = []
    for name in names:
        others = (f"{name}-{number}" for number in itertools.count(2))
        fresh = (other for other in others if other not in names and other not in unique)
        unique.append(next(fresh) if name == BASE or name in unique else name)
    return unique


def recipe_of(options: argparse.Namespace, runs: Sequence[Run]) -> RunConfig:
    """The recipe that the runs are evaluated by: that of --config or of the first run, with the options on top."""
    recipe = load_config(options.config, []) if options.config else runs[0].config
    for run in runs:
        _check_alike(recipe, f"--config {options.config}" if options.config else f"run {runs[0].name}", run)
    fresh = seed_of(recipe.seed, "evaluate")  # neither training nor its evaluations draw from it
    overrides = [f"evaluation.seed={fresh}", *options.set, *overrides_of(options)]
    config = load_config(options.config, overrides) if options.config else run_config(runs[0].folder, overrides)
    return _looked_at(config, options.reward)


def _check_alike(recipe: RunConfig, whose: str, run: Run) -> None:
    """Raise UserError if the run's pictures of a seed cannot be compared with the recipe's."""
    for key in _ALIKE:
        ours, theirs = (_without_thrift(getattr(config, key)) for config in (recipe, run.config))
        if ours != theirs:
            raise UserError(
                f"run {run.name} has {key} {_short(theirs)}, {whose} has {_short(ours)}; what is compared must have "
                f"the same {key}; evaluate it apart: rlr-ray evaluate {run.folder}"
            )


def _without_thrift(part: Any) -> Any:
    """A part of a recipe without the keys of a model that save memory or time and change no picture."""
    saving = {"gradient_checkpointing": False, "decode_slice": None, "compile": False}
    return part.model_copy(update=saving) if isinstance(part, ModelConfig) else part


def _short(part: Any) -> str:
    return "none" if part is None else str(part.model_dump(exclude_defaults=True))


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Overrides by --prompts, --seed and --chains; keys that only training reads become neutral and refuse nothing."""
    keys: dict[str, Any] = {"estimator": NEUTRAL, "guards": {}}
    keys |= {"prompts": options.prompts, "evaluation.seed": options.seed}
    keys |= {"evaluation.chains": getattr(options, "chains", None)}
    return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def _looked_at(config: RunConfig, rewards: Sequence[str]) -> RunConfig:
    """The config with more judges, as the --reward options say. Raises UserError for those that do not work."""
    judges: dict[str, Any] = {}
    for text in rewards:
        label, _, keys = text.partition("=")
        try:
            spelled = read_yaml(keys) if keys else {}
        except yaml.YAMLError as error:
            raise UserError(f"--reward {text!r}: {keys!r} is not YAML: {error}") from error
        if label in config.rewards or label in config.evaluation.judges or label in judges:
            raise UserError(f"--reward {label!r} is there already; give it another label: 'LABEL={{name: {label}}}'")
        judges[label] = spelled
    if not judges:
        return config
    values = config.model_dump(mode="json")
    values["evaluation"]["judges"] |= judges
    return parse_config(values)
