"""`rlr-ray plan`."""

from __future__ import annotations

import argparse

from rlr_ray.config.recipe import load_config, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.lab.measure import LEAST_BATCHES
from rlr_ray.lab.options import Choice
from rlr_ray.lab.planner import choose
from rlr_ray.lab.report import choice_table, choice_words, write_choice
from rlr_ray.utils.console import wide_console
from rlr_ray.utils.environment import prepare_process


def plan_command(options: argparse.Namespace) -> int:
    console = wide_console()
    if options.memory_budget_gib is not None:
        options.set = [*options.set, f"memory_budget_gib={options.memory_budget_gib}"]
    if options.batches is not None and options.batches < LEAST_BATCHES:
        raise UserError(f"--batches is {options.batches}; allowed: {LEAST_BATCHES} or more")
    config = resolve(load_config(options.config, options.set))
    if (options.out / "config.yaml").exists():
        raise UserError(f"--out {options.out} is a run's folder, whose own plan would be lost; name another folder")
    choice = choose_plan(config, options.batches)
    path = write_choice(options.out, config, choice)
    console.print(choice_table(choice))
    console.print(choice_words(choice), markup=False, soft_wrap=True)
    console.print(f"recipe: {path}; run it with `rlr-ray train --config {path}`", markup=False, soft_wrap=True)
    return 0


def choose_plan(config: RunConfig, batches: int | None = None) -> Choice:
    """Measure which plan is best, on the device that will backpropagate."""
    prepare_process(config.threads)
    if config.cluster == "none":
        return choose(config, batches)
    if not config.cluster.worker.gpus and not config.remote_rewards:
        return choose(config.on(0), batches)
    from rlr_ray.cluster.launch import choose_on_ray  # only here, so that all else works without Ray

    return choose_on_ray(config, config.cluster, batches)
