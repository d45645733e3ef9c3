"""The commands `rlr-ray lab`, `rlr-ray plan` and `rlr-ray doctor`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from rlr_ray.config import RunConfig
from rlr_ray.disk import load_sealed
from rlr_ray.doctor import Verdict, examine, judge, left_token
from rlr_ray.errors import UserError
from rlr_ray.lab.measure import LEAST_BATCHES
from rlr_ray.lab.planner import Choice, choose
from rlr_ray.lab.plans import default_plans, parse_plans
from rlr_ray.lab.report import (
    certificate_table,
    choice_table,
    choice_words,
    lab_table,
    profile_table,
    write_choice,
    write_json,
    write_lab,
)
from rlr_ray.lab.run import Laboratory, compare
from rlr_ray.recipes import load_config
from rlr_ray.state import TrainState

_WIDTH = 140
_COST = 20_000.0  # denoiser forwards a plan
_BATCHES, _TOY_BATCHES = 40, 400


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--config", help="a YAML recipe: its model, reward and prompts are measured")
    subject.add_argument("--model", choices=["toy"], help="toy: the unbiasedness certificate on an analytic chain")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--at", metavar="CHECKPOINT", help="measure where this checkpoint of a run stands")
    parser.add_argument(
        "--plan", action="append", default=[], metavar="NAME={KEYS}", help="a plan to measure, as keys of `estimator`"
    )
    parser.add_argument("--only", action="store_true", help="the plans of --plan alone, without the usual ones")
    parser.add_argument("--cost", type=float, help=f"denoiser forwards a plan (default {_COST:g})")
    parser.add_argument("--batches", type=int, help="of the reference (default 400 for toy, else 40)")
    parser.add_argument("--out", type=Path, default=Path("lab"), help="folder of lab.json, lab.parquet and lab.png")
    parser.add_argument("--json", action="store_true", help="write no table, but lab.json to the terminal")
    parser.set_defaults(command=lab_command)


def lab_command(options: argparse.Namespace) -> int:
    """0, or 1 if a plan of the certificate that claims to be unbiased is not."""
    console = wide_console()
    if options.batches is not None and options.batches < LEAST_BATCHES:
        raise UserError(f"--batches is {options.batches}; allowed: {LEAST_BATCHES} or more")
    if options.model == "toy":
        return _certify(options, console)
    _compare(options, console)
    return 0


def _certify(options: argparse.Namespace, console: Console) -> int:
    from rlr_ray.lab.certificate import LIMIT, certify, toy_candidates  # here: diffusers takes seconds to import

    ignored = [name for name in ("set", "plan", "only", "at", "cost") if getattr(options, name)]
    if ignored:
        raise UserError(
            f"--model toy measures plans of its own; leave out {', '.join('--' + name for name in ignored)}"
        )
    torch.set_num_threads(1)  # the toy's tensors are too small to share
    rows = []
    for candidate in toy_candidates():
        rows.append(certify(candidate, options.batches or _TOY_BATCHES))
        if not options.json:
            verdict = "biased, as it says" if rows[-1].biased else "ok" if rows[-1].ok else "FAILED"
            console.print(f"{candidate.name}: {verdict}", markup=False)
    failed = [row.name for row in rows if not row.ok]
    whole = {"limit": LIMIT, "failed": failed, "plans": [asdict(row) for row in rows]}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "lab.json", whole)
    if options.json:
        print((options.out / "lab.json").read_text("utf-8"), end="")
    else:
        console.print(certificate_table(rows))
        console.print(f"failed: {', '.join(failed)}" if failed else f"every z-score is at most {LIMIT}", style="bold")
    return 1 if failed else 0


def _compare(options: argparse.Namespace, console: Console) -> None:
    config = load_config(options.config, options.set)
    own = parse_plans(options.plan)
    plans = own if options.only else default_plans(config) | own
    if not plans:
        raise UserError("--only leaves no plan; name one with --plan 'name={key: value}'")
    theta, guides = standing(options.at, config)
    laboratory = Laboratory(config, theta, guides, options.batches or _BATCHES)
    quiet = lambda text: None if options.json else console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    cost = options.cost or _COST
    reference, results, left_out = compare(laboratory, plans, cost, quiet)
    if not results:
        raise UserError(f"no plan works with this recipe: {'; '.join(left_out.values())}")
    profile = laboratory.profile(reference)
    write_lab(options.out, config, cost, reference, results, left_out, profile)
    if options.json:
        print((options.out / "lab.json").read_text("utf-8"), end="")
        return
    console.print(lab_table(results))
    console.print(profile_table(profile))
    console.print(f"lab.json, lab.parquet and lab.png are in {options.out}", markup=False)


def standing(checkpoint: str | None, config: RunConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Theta and the span of guided directions at a checkpoint; None, None at the start of a run."""
    if checkpoint is None:
        return None, None
    if not Path(checkpoint).is_file():
        raise UserError(
            f"--at {checkpoint!r} is no file; give a checkpoint, e.g. runs/digits/checkpoints/update_000040.pt"
        )
    try:
        saved = load_sealed(Path(checkpoint), torch.device("cpu"))
        state = TrainState(saved["theta"], config.train, config.estimator)
        state.load_state_dict(saved)
    except Exception as error:  # unpickling raises whatever it stumbles over
        raise UserError(f"--at {checkpoint!r} is no checkpoint of a run: {error!r}") from error
    return saved["theta"], state.directions().basis


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--memory-budget-gib", type=float, metavar="GIB", help="as --set memory_budget_gib=GIB")
    parser.add_argument("--batches", type=int, help="for the variances (default: half a minute's, 64 at most)")
    parser.add_argument("--out", type=Path, default=Path("plan"), help="folder of plan.yaml and plan.json")
    parser.set_defaults(command=plan_command)


def plan_command(options: argparse.Namespace) -> int:
    console = wide_console()
    if options.memory_budget_gib is not None:
        options.set = [*options.set, f"memory_budget_gib={options.memory_budget_gib}"]
    if options.batches is not None and options.batches < LEAST_BATCHES:
        raise UserError(f"--batches is {options.batches}; allowed: {LEAST_BATCHES} or more")
    config = load_config(options.config, options.set)
    choice = choose_plan(config, console, options.batches)
    path = write_choice(options.out, config, choice)
    console.print(choice_table(choice))
    console.print(choice_words(choice), markup=False, soft_wrap=True)
    console.print(f"recipe: {path}; run it with `rlr-ray train --config {path}`", markup=False, soft_wrap=True)
    return 0


def choose_plan(config: RunConfig, console: Console, batches: int | None = None) -> Choice:
    """Measure which plan is best, on the device that will backpropagate."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if config.cluster == "none":
        return choose(config, say, batches)
    if not config.cluster.worker.gpus and not config.apart:
        return choose(config.on(0), say, batches)
    from rlr_ray.cluster.launch import choose_on_ray  # only here, so that all else works without Ray

    return choose_on_ray(config, config.cluster, batches, say)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.set_defaults(command=doctor_command)


def doctor_command(options: argparse.Namespace) -> int:
    """0, or 1 if something is not well."""
    console = wide_console()
    config = load_config(options.config, options.set)
    verdicts = _examine(config, lambda text: console.print(text, markup=False))
    for verdict in verdicts:
        mark, style = ("ok", "green") if verdict.ok else ("NOT WELL", "bold red")
        remedy = "" if verdict.ok else f"; {verdict.remedy}"
        console.print(f"{mark}: {verdict.what}: {verdict.found}{remedy}", style=style, markup=False, soft_wrap=True)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _examine(config: RunConfig, say: Callable[[str], None]) -> list[Verdict]:
    with left_token(config.folder.parent) as token:
        driver = examine("this machine", str(config.folder.parent), token, os.getcwd())
        if config.cluster == "none":
            return judge(config, driver, [])
        from rlr_ray.cluster.doctor import examine_cluster  # only here, so that all else works without Ray

        reports, verdicts = examine_cluster(config, config.cluster, token, say)
    return judge(config, driver, reports) + verdicts


def wide_console() -> Console:
    """Wide enough for a table's line where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)
