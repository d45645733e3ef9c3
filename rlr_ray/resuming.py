"""Which run is meant: by its name, or by the path of its folder."""

from __future__ import annotations

import os
from pathlib import Path

from rlr_ray.config import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.recipes import load_config, parse_overrides


def config_of(recipe: str | None, overrides: list[str], run: str | None) -> RunConfig:
    """The config of a recipe, or of the run that --resume names, whose own config.yaml then is the recipe.

    A run's name and output_dir are where its folder lies now. Raises UserError if recipe and run do not agree.
    """
    if not run:
        if recipe is None:
            raise UserError(
                "train was given no recipe; write --config RECIPE to start a run, or --resume RUN to go on with one"
            )
        return load_config(recipe, overrides)
    if recipe is None:
        folder = find_run(
            run, parse_overrides(overrides).get("output_dir", RunConfig.model_fields["output_dir"].default)
        )
        config = run_config(folder, overrides)
        named_by = "--set"
    else:
        config = load_config(recipe, overrides)
        folder = find_run(run, config.output_dir)
        named_by = "--config"
    if not (config.folder.exists() and config.folder.samefile(folder)):
        raise UserError(
            f"--resume {run!r} is the run in {folder}, but {named_by} names the one in {config.folder}; leave out "
            f"{named_by}: the recipe of a run that is resumed is its own config.yaml"
        )
    return config


def run_config(folder: Path, overrides: list[str]) -> RunConfig:
    """A run's own config.yaml with overrides, its name and output_dir where its folder lies now."""
    return load_config(str(folder / "config.yaml"), overrides, {"name": folder.name, "output_dir": str(folder.parent)})


def find_run(run: str, output_dir: str, asked_by: str = "--resume") -> Path:
    """The folder of a run, by its name under output_dir or by its path. Raises UserError if there is none."""
    root = Path(output_dir).expanduser()
    places = [Path(os.path.abspath(place)) for place in (root / run, Path(run).expanduser())]
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    names = sorted(file.parent.name for file in root.glob("[!.]*/config.yaml"))
    raise UserError(
        f"{asked_by} {run!r}: no run lies in {' or in '.join(map(str, dict.fromkeys(places)))}; allowed: a run of "
        f"{root} ({', '.join(names) or 'there is none'}), or the path of a run's folder"
    )
