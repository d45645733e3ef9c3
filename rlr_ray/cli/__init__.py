"""The commands: `rlr-ray init | train | evaluate | sample | lab | plan | tune | dcot | doctor`."""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import gc
import importlib
import sys
from collections.abc import Sequence

from rich.console import Console

from rlr_ray.errors import UserError
from rlr_ray.utils.console import forgive, messages_on, wide_console
from rlr_ray.utils.environment import set_variables
from rlr_ray.utils.signals import Ended, Terminated, heeded, status_of

_COMMANDS = {  # what each is for, and what adds its options
    "init": ("write a commented recipe for a model, a reward and prompts", "rlr_ray.cli.init:add_init_arguments"),
    "train": ("fine-tune a model", "rlr_ray.cli.train:add_train_arguments"),
    "evaluate": ("compare finished runs with the base model", "rlr_ray.cli.evaluate:add_evaluate_arguments"),
    "sample": ("draw pictures from a run or a base model", "rlr_ray.cli.evaluate:add_sample_arguments"),
    "lab": ("measure bias, variance, cost and memory of plans", "rlr_ray.cli.lab:add_lab_arguments"),
    "plan": ("choose the best plan for a memory budget, by measurement", "rlr_ray.cli.plan:add_plan_arguments"),
    "tune": ("search over a recipe's keys, within memory budgets", "rlr_ray.cli.tune:add_tune_arguments"),
    "dcot": ("prompts for each range of steps, and where the ranges lie", "rlr_ray.cli.dcot:add_dcot_arguments"),
    "doctor": ("check the machines that a recipe would run on", "rlr_ray.cli.doctor:add_doctor_arguments"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 if what it checks does not hold, 2 if the user must mend something.

    130, 143 and the like if a signal ended it.
    """
    atexit.register(gc.freeze)  # else Python looks through all of torch's objects once more, for a second
    set_variables()
    for stream in (sys.stdout, sys.stderr):
        forgive(stream)
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:  # a crash in a reward's own code says where
        faulthandler.enable(sys.__stderr__)
    arguments = sys.argv[1:] if arguments is None else arguments
    options, errors = argparse.Namespace(), Console(stderr=True)
    try:
        with heeded():
            _parser(arguments).parse_args(arguments, options)
            with messages_on(errors if getattr(options, "json", False) else wide_console()):
                return options.command(options) or 0
    except Ended as error:
        errors.print(str(error), markup=False, soft_wrap=True)
        return status_of(str(error).split()[0])
    except UserError as error:
        errors.print(f"error: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as interrupt:
        name = str(interrupt) if isinstance(interrupt, Terminated) else ""
        again = getattr(options, "again", "the same command begins again")
        told = again() if callable(again) else again
        errors.print(f"{name or 'interrupted'}; {told}", markup=False, soft_wrap=True)
        return status_of(name or "SIGINT")


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
