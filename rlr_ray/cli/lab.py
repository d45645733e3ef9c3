"""`rlr-ray lab`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict

from rich.console import Console

from rlr_ray.cli.arguments import LAB_COST
from rlr_ray.config.recipe import load_config, resolve
from rlr_ray.errors import UserError
from rlr_ray.lab.compare import Laboratory, compare, standing_at
from rlr_ray.lab.measure import LEAST_BATCHES
from rlr_ray.lab.plans import default_plans, parse_plans
from rlr_ray.lab.report import certificate_table, lab_table, steps_table, verdict_words, write_json, write_lab
from rlr_ray.utils.console import wide_console
from rlr_ray.utils.environment import prepare_process

logger = logging.getLogger(__name__)
_BATCHES, _TOY_BATCHES = 40, 240


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
    from rlr_ray.lab.certificate import LIMIT, Truth, certify  # here: diffusers takes seconds to import
    from rlr_ray.lab.toy_cases import toy_cases

    ignored = [name for name in ("set", "plan", "only", "at", "cost") if getattr(options, name)]
    if ignored:
        raise UserError(
            f"--model toy measures plans of its own; leave out {', '.join('--' + name for name in ignored)}"
        )
    prepare_process(1)  # the toy's tensors are too small to share
    rows, truth = [], Truth(options.batches or _TOY_BATCHES)
    for case in toy_cases():
        rows.append(certify(case, truth))
        logger.info(f"{rows[-1].name}: {verdict_words(rows[-1])}")
    failed = [row.name for row in rows if not row.ok]
    whole = {"limit": LIMIT, "failed": failed, "plans": [asdict(row) for row in rows]}
    write_json(options.out / "lab.json", whole)
    if options.json:
        print((options.out / "lab.json").read_text("utf-8"), end="")
    else:
        console.print(certificate_table(rows))
        console.print(f"failed: {', '.join(failed)}" if failed else f"every z-score is at most {LIMIT}", style="bold")
        console.print("a bias along g of five standard errors would exceed it in 93 of 100 seeds")
    return 1 if failed else 0


def _compare(options: argparse.Namespace, console: Console) -> None:
    config = resolve(load_config(options.config, options.set))
    plans = parse_plans(options.plan)
    plans = plans if options.only else default_plans(config) | plans
    if not plans:
        raise UserError("--only leaves no plan; name one with --plan 'name={key: value}'")
    prepare_process(config.threads)
    theta, guides = standing_at(options.at, config)
    laboratory = Laboratory(config, theta, guides, options.batches or _BATCHES)
    cost = options.cost or LAB_COST
    reference, results, left_out = compare(laboratory, plans, cost)
    if not results:
        raise UserError(f"no plan works with this recipe: {'; '.join(left_out.values())}")
    profile = laboratory.profile(reference)
    write_lab(options.out, config, cost, reference, results, left_out, profile)
    if options.json:
        print((options.out / "lab.json").read_text("utf-8"), end="")
        return
    console.print(lab_table(results))
    console.print(steps_table("Steps; variances per chain", profile))
    console.print(f"lab.json, lab.parquet and lab.png are in {options.out}", markup=False)
