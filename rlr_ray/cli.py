"""The commands: `rlr-ray train | evaluate | sample | lab | plan | tune | dcot | doctor`."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rlr_ray.config import RunConfig
from rlr_ray.describe import describe_plan, describe_prompts, describe_results, describe_sizes
from rlr_ray.engine import check_reward
from rlr_ray.errors import UserError
from rlr_ray.lock import locked
from rlr_ray.progress import progress
from rlr_ray.resuming import config_of
from rlr_ray.run_folder import RunFolder
from rlr_ray.start import run

_COMMANDS = {  # what each is for, and what adds its options
    "train": ("fine-tune a model", "rlr_ray.cli:add_train_arguments"),
    "evaluate": ("compare finished runs with the base model", "rlr_ray.evaluation.command:add_evaluate_arguments"),
    "sample": ("draw pictures from a run or a base model", "rlr_ray.evaluation.command:add_sample_arguments"),
    "lab": ("measure bias, variance, cost and memory of plans", "rlr_ray.commands:add_lab_arguments"),
    "plan": ("choose the best plan for a memory budget, by measurement", "rlr_ray.commands:add_plan_arguments"),
    "tune": ("search over a recipe's keys, within memory budgets", "rlr_ray.tune.command:add_tune_arguments"),
    "dcot": (
        "prompts for each range of steps, and where the ranges lie",
        "rlr_ray.dcot.command:add_dcot_arguments",
    ),
    "doctor": ("check the machines that a recipe would run on", "rlr_ray.commands:add_doctor_arguments"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 if what it checks does not hold, 2 if the user must mend something."""
    atexit.register(gc.freeze)  # else Python looks through all of torch's objects once more, for a second
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of processors that no run uses
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    errors = Console(stderr=True)
    try:
        return options.command(options) or 0
    except UserError as error:
        errors.print(f"error: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted; the same command with --resume goes on from the last checkpoint", soft_wrap=True)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Of all commands, with the options of the one that is asked for: importing the others' files takes seconds."""
    parser = argparse.ArgumentParser(prog="rlr-ray", description="Fine-tune a diffusion model to raise a reward.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (purpose, place) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name in arguments:
            module, _, function = place.partition(":")
            getattr(importlib.import_module(module), function)(command)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="a YAML recipe, e.g. configs/digits.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with the run of this name, or with RUN, a name under output_dir or a folder, by its own recipe",
    )
    earlier.add_argument(
        "--resume-or-start", action="store_true", help="the same if there is such a run, else start it"
    )
    earlier.add_argument("--overwrite", action="store_true", help="delete the run of this name and start again")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print plan, cost and sizes, and stop")
    parser.set_defaults(command=train_command)


def train_command(options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    config = config_of(options.config, options.set, options.resume)
    check_reward(config)
    prompts = describe_prompts(config)
    if options.dry_run:
        console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False)
        console.print(f"{describe_plan(config)}\n{prompts}\n{describe_sizes(config)}", markup=False, soft_wrap=True)
        return
    console.print(prompts, markup=False, soft_wrap=True)
    with locked(config):
        resume = options.resume is not None or (options.resume_or_start and RunFolder(config).holds_run)
        _train(config, console, resume=resume, overwrite=options.overwrite)


def _train(config: RunConfig, console: Console, *, resume: bool, overwrite: bool) -> None:
    """Run what nobody else runs now, after the plan is chosen if it is to be."""
    if resume and config.estimator.preset == "auto":
        from rlr_ray.lab.report import as_chosen  # here, as below: the laboratory takes seconds to import

        config = as_chosen(config, RunFolder(config).path)
    RunFolder(config).check(resume=resume, overwrite=overwrite)
    config, leave = _choose(config, console) if config.estimator.preset == "auto" else (config, _leave_nothing)
    folder = RunFolder(config)

    def begin() -> None:
        folder.begin(resume=resume, leave=leave)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(describe_plan(config))
    with progress(console, config.train.iterations) as report:
        run(config, report, say, begin)
    say(describe_results(folder))


def _choose(config: RunConfig, console: Console) -> tuple[RunConfig, Callable[[Path], Any]]:
    """The config with the plan that measurement chose, and what leaves the choice in the run's folder."""
    from rlr_ray.commands import choose_plan
    from rlr_ray.lab.plans import with_plan
    from rlr_ray.lab.report import choice_words, write_choice

    choice = choose_plan(config, console)
    console.print(choice_words(choice), markup=False, soft_wrap=True)
    chosen = with_plan(config, choice.best.keys)
    return chosen, lambda folder: write_choice(folder, chosen, choice)


def _leave_nothing(folder: Path) -> None:
    """Of a run whose plan is its recipe's."""
