"""`rlr-ray dcot expand` and `rlr-ray dcot locate`."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from dataclasses import asdict
from typing import Any

from rich.progress import track

from rlr_ray.config.estimator import SubChainConfig
from rlr_ray.config.recipe import load_config, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError
from rlr_ray.lab.compare import Laboratory, standing_at
from rlr_ray.lab.locate import Location, bounds, forecasts, free_steps, locate, step_rows
from rlr_ray.lab.report import steps_table, write_json
from rlr_ray.prompts.expand import Endpoint, append_row, expand, fill, parse_template, remaining
from rlr_ray.prompts.load import load_prompts
from rlr_ray.utils.console import wide_console
from rlr_ray.utils.environment import prepare_process
from rlr_ray.utils.files import disk_errors
from rlr_ray.utils.memory import memory_errors

logger = logging.getLogger(__name__)

_SHARE = 5  # a range whose end is not seen has a fifth of the steps, as the paper's for hands


def expand_command(options: argparse.Namespace) -> None:
    if options.out.suffix != ".jsonl":
        raise UserError(f"--out {str(options.out)!r} ends in {options.out.suffix!r}; allowed: .jsonl")
    console = wide_console()
    template = parse_template(options.template)
    triple_of = _endpoint(options) or functools.partial(fill, template)
    prompts = load_prompts(options.prompts, logger.info)
    left, others = remaining(prompts, options.out)
    done = len(prompts) - len(left)
    if done:
        logger.info(
            f"{done} of {len(prompts)} prompts kept as they are in {options.out}; remove it to have them written anew"
        )
    if others:
        logger.info(f"{others} rows of other prompts stay in {options.out}")
    rows = expand(left, triple_of)
    try:
        for row in track(rows, "prompts", len(left), console=console, disable=not console.is_terminal):
            with disk_errors():
                append_row(options.out, row)
            done += 1
    except UserError:
        logger.info(f"{done} of {len(prompts)} prompts are in {options.out}; the same command goes on from there")
        raise
    logger.info(f"{len(prompts)} prompts: {options.out}")


def _endpoint(options: argparse.Namespace) -> Endpoint | None:
    if options.endpoint is None:
        if options.model or options.api_key_env:
            raise UserError("--model and --api-key-env belong to an endpoint; give --endpoint URL, or leave them out")
        return None
    if options.template or not options.model:
        raise UserError("--endpoint asks a language model: give its name with --model, and no --template")
    key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not key:
        raise UserError(f"--api-key-env {options.api_key_env!r} is not set in the environment; export it first")
    return Endpoint(options.endpoint, options.model, key)


@memory_errors()
def locate_command(options: argparse.Namespace) -> None:
    console = wide_console()
    if options.batches < 1:
        raise UserError(f"--batches is {options.batches}; allowed: 1 or more")
    config = resolve(load_config(options.config, options.set))
    steps = config.sampler.steps
    length = max(steps // _SHARE, config.estimator.sub_chain.length, 1) if options.length is None else options.length
    if steps < 3 or not 0 < length <= steps:
        raise UserError(f"--length is {length} of {steps} steps; allowed: 1 to sampler.steps, which must be 3 or more")
    prepare_process(config.threads)
    laboratory = Laboratory(config, standing_at(options.at, config)[0], None, options.batches)
    subject = laboratory.subject
    rewards = forecasts(subject, options.batches)
    rows, location = step_rows(rewards, subject.sampler.schedule), locate(rewards, length)
    console.print(steps_table(f"Promised reward, {rewards.shape[1]} chains", rows))
    proposal = None
    if location is None:
        console.print("no step's forecast changes by three standard errors; raise --batches, or keep place: uniform")
    else:
        proposal, why = _proposal(options, config, location, subject.sampler.schedule)
        end = "" if location.recovers else f"; its end was not seen, so it has --length {length}"
        console.print(
            f"steps {location.first}-{location.last} lose {location.loss:.3g} of the reward{end}", markup=False
        )
        if why:
            console.print(f"no sub-chain to place there: {why}", markup=False, soft_wrap=True)
        for key, value in proposal.items():
            console.print(f"{key}: {value}".replace("'", ""), markup=False, soft_wrap=True)
    told = {"chains": rewards.shape[1], "end": float(rewards[-1].mean()), "steps": rows, "proposal": proposal}
    write_json(options.out / "locate.json", told | {"location": asdict(location) if location else None})
    console.print(f"locate.json is in {options.out}", markup=False)


def _proposal(
    options: argparse.Namespace, config: RunConfig, location: Location, schedule: Schedule
) -> tuple[dict[str, Any], str]:
    """Keys with which the recipe loads, and why there is no sub-chain among them if there is none."""
    dcot, stated = {"dcot": bounds(location, config.sampler.steps)}, config.estimator.sub_chain
    shape = config.plan_shape.without_last(config.adapter.steps_off(schedule))
    free, steps = free_steps(location, shape, schedule), f"{location.first}-{location.last}"
    if config.chooses_plan:
        return dcot, "preset 'measure' chooses the plan"
    if shape.free_stop <= location.first:
        return dcot, f"steps {steps} are first order's or the base model's already"
    if not free:
        return dcot, f"the sampler adds no noise at those of steps {steps} that first order leaves"
    count = min(stated.count, len(free))
    length = min(stated.length or SubChainConfig().length, len(free) // count)
    sub_chain: dict[str, Any] = {"place": [free[0], free[-1]], "length": length}
    sub_chain |= {"count": count} if count != stated.count else {}
    try:
        keys = [f"estimator.sub_chain.{key}={value}" for key, value in sub_chain.items()]
        keys += [f"dcot.{key}={value}" for key, value in dcot["dcot"].items()]
        resolve(load_config(options.config, [*options.set, *keys])).shape_on(schedule)
    except UserError as error:
        return dcot, str(error)
    return {"estimator": {"sub_chain": sub_chain}} | dcot, ""
