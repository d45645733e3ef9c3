"""`rlr-ray train`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlr_ray.cluster.run import run
from rlr_ray.config.checks import check_first_order
from rlr_ray.config.describe import clipped_words, describe_plan
from rlr_ray.config.recipe import config_of, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.registry import build_loggers
from rlr_ray.loggers.surrogate import surrogate_words
from rlr_ray.loggers.terminal import progress
from rlr_ray.prompts.load import describe_prompts
from rlr_ray.train.run_folder import RunFolder, locked
from rlr_ray.train.state import check_optimizer
from rlr_ray.utils.console import wide_console

logger = logging.getLogger(__name__)


def train_command(options: argparse.Namespace) -> None:
    console = wide_console()
    config = config_of(options.config, options.set, options.resume)
    config = config if options.dry_run else resolve(config)
    check_first_order(config)
    check_optimizer(config.train)
    build_loggers(config, own=not options.dry_run)  # once more where the run is led; what cannot be is refused here
    prompts = describe_prompts(config)
    if options.dry_run:
        from rlr_ray.models.sizes import describe_sizes  # here: it imports every kind of adapter

        console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False)
        console.print(f"{describe_plan(config)}\n{prompts}\n{describe_sizes(config)}", markup=False, soft_wrap=True)
        return
    logger.info(prompts)
    with locked(config.folder):
        resume = options.resume is not None or (options.resume_or_start and RunFolder(config).holds_run)
        if RunFolder(config).holds_run:
            options.again = f"the run in {config.folder} is as it was; the same command begins again"

        def begun() -> None:
            options.again = lambda: _goes_on(RunFolder(config))

        _train(config, begun, resume=resume, overwrite=options.overwrite, accept_changes=options.accept_changes)


def _goes_on(folder: RunFolder) -> str:
    """How a run goes on that was interrupted, as far as it came."""
    steps = folder.checkpoints.steps()
    return f"`rlr-ray train --resume {folder.path}` " + (
        f"goes on from update {steps[-1]}" if steps else "begins it again: it has left no checkpoint yet"
    )


def _train(
    config: RunConfig, begun: Callable[[], None], *, resume: bool, overwrite: bool, accept_changes: bool
) -> None:
    """Run what nobody else runs now, after the plan is chosen if it is to be; `begun` is called once it has begun."""
    if resume and config.chooses_plan:
        from rlr_ray.lab.report import as_chosen  # here, as below: the laboratory takes seconds to import

        config = as_chosen(config, RunFolder(config).path)
    RunFolder(config).check(resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    config, leave = _choose(config) if config.chooses_plan else (config, _leave_nothing)
    folder = RunFolder(config)

    def begin() -> None:
        folder.begin(resume=resume, leave=leave)
        begun()

    logger.info(describe_plan(config))
    with progress(wide_console(), config.train.iterations) as report:
        run(config, report, begin)
    wide_console().print(describe_results(folder), markup=False, soft_wrap=True)


def describe_results(folder: RunFolder) -> str:
    """What came of a finished run, and where to look."""
    summary = folder.load_summary()
    lines = [
        f"report:   {folder.report}",
        f"held-out reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}: "
        f"gain {summary['gain']:.3f} +- {summary['gain_se']:.3f} (standard error over paired seeds)",
    ]
    for label, scores in summary["scores"].items():
        kind = "judge (never trained on)" if label in summary["judges"] else "reward"
        change = f"{scores['gain']:+.3f} +- {scores['gain_se']:.3f}"
        lines.append(f"{kind} {label}: {scores['before']:.3f} -> {scores['after']:.3f}: {change}")
    if summary["kl"] is not None:
        lines.append(f"KL to the base model: {summary['kl']:.3g} nats a chain")
    if summary["steps_off"]:
        steps = ", ".join(map(str, summary["steps_off"]))
        lines.append(f"the adapter is off at step {steps}; in plain diffusers that takes a callback (docs/evaluate.md)")
    if summary["kept_update"] < summary["steps"]:
        kept = summary["kept_update"]
        left = f"what update {kept} had left" if kept else "the start, since nothing beat it"
        lines.append(f"kept: {left}; the best by the held-out reward (guards.keep)")
    lines += [f"clipped: {clipped_words(summary['clipped'])}"] if summary["clipped"] else []
    lines += surrogate_words(summary["surrogate"])
    lines += [f"warning: {text}" for text in summary["warnings"]]
    lines += [
        f"{summary['steps']} updates, {summary['denoiser_forwards']} denoiser forwards, {summary['seconds']:.0f} s, "
        f"on {summary['ran_on']}",
        *(f"pictures: {path}" for path in sorted(folder.samples.glob("before_after.*"))),
        f"curve:    {folder.path / 'reward_curve.png'}",
        f"adapter:  {folder.path / summary['adapter']}",
        *(f"{name}: {link}" for name, link in summary["links"].items()),
    ]
    if not summary["adapter"].startswith("lora/"):
        lines.append(
            "          (in PEFT's own format, which diffusers' load_lora_weights does not read; "
            "load it with peft.PeftModel.from_pretrained(pipeline.unet, folder), or pipeline.transformer)"
        )
    return "\n".join(lines)


def _choose(config: RunConfig) -> tuple[RunConfig, Callable[[Path], Any]]:
    """The config with the plan that measurement chose, and what leaves the choice in the run's folder."""
    from rlr_ray.cli.plan import choose_plan
    from rlr_ray.lab.plans import with_plan
    from rlr_ray.lab.report import choice_words, write_choice

    choice = choose_plan(config)
    logger.info(choice_words(choice))
    chosen = with_plan(config, choice.best.keys)
    return chosen, lambda folder: write_choice(folder, chosen, choice)


def _leave_nothing(folder: Path) -> None:
    """Of a run whose plan is its recipe's."""
