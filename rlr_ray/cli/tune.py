"""`rlr-ray tune`."""

from __future__ import annotations

import argparse
import logging

import yaml

from rlr_ray.config.recipe import parse_config, read_recipe
from rlr_ray.config.tune import TuneConfig, base_values, load_tune_config
from rlr_ray.errors import UserError
from rlr_ray.train.run_folder import locked
from rlr_ray.utils.files import disk_errors, make_folder, refuse_foreign, replace_file

logger = logging.getLogger(__name__)


def tune_command(options: argparse.Namespace) -> None:
    config = load_tune_config(options.config, options.set)
    parse_config(base_values(config))
    with locked(config.folder, "search"):
        _begin(config, resume=options.resume, overwrite=options.overwrite)
        _run(config)


def _run(config: TuneConfig) -> None:
    # only here, so that all else works without Ray, Optuna and plotly
    from rlr_ray.tune.report import write_report
    from rlr_ray.tune.results import best_rows, write_results
    from rlr_ray.tune.search import search

    rows = search(config)
    with disk_errors():
        recipes = write_results(config, rows)
        write_report(config, rows)
    for budget in config.budgets_gib:
        row = best_rows(config, rows).get(budget)
        if row is None:
            logger.info(f"{budget:g} GiB: no trial finished within it; see why in {config.folder / 'results.parquet'}")
        else:
            logger.info(f"{budget:g} GiB: best reward {row['reward']:.4g} ± {row['reward_se']:.2g} at {row['point']}")
    logger.info(f"report: {config.folder / 'report.html'}")
    for recipe in recipes:
        logger.info(f"recipe: {recipe}; run it with `rlr-ray train --config {recipe}`")


@disk_errors()
def _begin(config: TuneConfig, *, resume: bool, overwrite: bool) -> None:
    """Make the search's folder. Raises UserError if another's results would be lost or mixed with this search's."""
    file = config.folder / "tune.yaml"
    now = config.model_dump(mode="json") | {"base": read_recipe(config.base)}  # its keys, wherever it lies
    saved = read_recipe(str(file)) if file.is_file() else {}
    if not isinstance(saved.get("base"), dict):  # nor is a search that someone wrote, which names its base
        refuse_foreign(config.folder, "search")
        if resume:
            raise UserError(
                f"{config.folder} holds no search to resume; leave out --resume, or set name and output_dir"
            )
    elif resume:
        changed = sorted(key for key in now if now[key] != saved.get(key) and key != "output_dir")
        if changed:
            raise UserError(
                f"{config.folder} was begun with another {', '.join(changed)}; undo the change, or start a new search "
                "with --set name=..."
            )
    elif not overwrite:
        raise UserError(
            f"{config.folder} already holds a search; allowed: --resume to go on with it, --overwrite to start again, "
            "or another --set name=..."
        )
    make_folder(config.folder, anew=not resume)
    replace_file(file, lambda part: part.write_text(yaml.safe_dump(now, sort_keys=False), "utf-8"))
