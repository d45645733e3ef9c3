"""The commands: `rlr-ray` init, train, watch, report, evaluate, sample, export, push, lab, plan, tune, dcot, doctor."""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import gc
import importlib
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from rlr_ray.cli import arguments
from rlr_ray.errors import UserError
from rlr_ray.utils.console import forgive, messages_on, wide_console
from rlr_ray.utils.environment import set_variables
from rlr_ray.utils.signals import Ended, Terminated, heeded, status_of

_COMMANDS = {  # what each is for; its options: rlr_ray/cli/arguments.py
    "init": "write a commented recipe for a model, a reward and prompts",
    "train": "fine-tune a model",
    "watch": "follow runs and searches on a page while they go on",
    "report": "put a run, or several side by side, on a page",
    "evaluate": "compare finished runs with the base model",
    "sample": "draw pictures from a run or a base model",
    "export": "write a run's model as a diffusers pipeline of its own, what was trained in its weights",
    "push": "put what a run trained on the Hugging Face hub, with a model card",
    "lab": "measure bias, variance, cost and memory of plans",
    "plan": "choose the best plan for a memory budget, by measurement",
    "tune": "search over a recipe's keys, within memory budgets",
    "dcot": "prompts for each range of steps, and where the ranges lie",
    "doctor": "check the machines that a recipe would run on",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 if what it checks does not hold, 2 if the user must mend something.

    130, 143 and the like if a signal ended it.
    """
    atexit.register(gc.freeze)  # else Python looks through all of torch's objects once more, for a second
    set_variables()
    for stream in (sys.stdout, sys.stderr):
        forgive(stream)
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:  # a crash in a reward's own code says where
        faulthandler.enable(sys.__stderr__)
    options, errors = argparse.Namespace(), Console(stderr=True)
    try:
        with heeded():
            _parser().parse_args(words, options)
            with messages_on(errors if getattr(options, "json", False) else wide_console()):
                return _function(options.command)(options) or 0
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlr-ray", description="Fine-tune a diffusion model to raise a reward.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, purpose in _COMMANDS.items():
        getattr(arguments, f"add_{name}_arguments")(commands.add_parser(name, help=purpose))
    return parser


def _function(place: str) -> Callable[[argparse.Namespace], int | None]:
    """`module:function` of this folder, imported only now: some take seconds."""
    module, _, name = place.partition(":")
    function: Callable[[argparse.Namespace], int | None] = getattr(
        importlib.import_module(f"{__name__}.{module}"), name
    )
    return function
