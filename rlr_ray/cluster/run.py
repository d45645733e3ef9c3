"""A run from its config to its results, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlr_ray.config.checks import check_first_order
from rlr_ray.config.recipe import resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from rlr_ray.train.state import check_optimizer
from rlr_ray.utils.environment import prepare_process, set_variables

if TYPE_CHECKING:
    from rlr_ray.loggers import Report


def run(config: RunConfig, report: Report, begin: Callable[[], None]) -> None:
    """Train in this process or on Ray. `begin` is called once all is ready: a bad config costs no earlier run."""
    if config.chooses_plan:
        raise UserError(
            "estimator.preset is 'measure', and no plan was chosen yet; `rlr-ray train` and `plan` choose one"
        )
    if config.cluster == "none":
        from rlr_ray.train.loop import train  # only here: what draws its pictures takes seconds to import

        prepare_process(config.threads)
        engine = Engine(config)
        begin()
        train(engine, None, report)
        return
    set_variables()
    from rlr_ray.cluster.launch import run_on_ray  # only here, so that all else works without Ray

    run_on_ray(config, config.cluster, report, begin)


def run_recipe(
    config: RunConfig,
    report: Report = lambda row: None,
    *,
    resume: bool = False,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Train in the recipe's folder, output_dir/name, as `rlr-ray train` does; the summary. The public API's `run`.

    `accept_changes`: a run is resumed though its prompts, reward modules or weights have changed.
    `report` is given every update's row. Raises UserError for a bad recipe, a folder that holds another run, or none to
    resume.
    """
    from rlr_ray.train.run_folder import RunFolder, locked  # here, as above

    config = resolve(config)
    check_first_order(config)
    check_optimizer(config.train)
    folder = RunFolder(config)
    with locked(config.folder):
        folder.check(resume=resume, overwrite=False, accept_changes=accept_changes)
        run(config, report, lambda: folder.begin(resume=resume))
        return folder.load_summary()
