"""`rlr-ray export`: a run's model as a pipeline of its own."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from rlr_ray.config.recipe import run_config
from rlr_ray.errors import UserError
from rlr_ray.evaluation.runs import finished_run, overrides_of
from rlr_ray.loggers.card import write_card
from rlr_ray.models.fused import save_fused
from rlr_ray.utils.console import wide_console
from rlr_ray.utils.environment import prepare_process
from rlr_ray.utils.files import disk_errors
from rlr_ray.utils.memory import memory_errors


@memory_errors()
def export_command(options: argparse.Namespace) -> None:
    folder: Path = options.fuse
    if folder.exists():
        raise UserError(f"--fuse {folder} is there already; give a folder that export is to make")
    run = finished_run(options.run, options.set)
    config = run_config(run.folder, [*options.set, *overrides_of(options)])
    prepare_process(config.threads)
    part = folder.with_name(f".{folder.name}.part")  # a kill leaves no half of a pipeline under its name
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
    try:
        with disk_errors():
            part.mkdir(parents=True)
            kind = save_fused(config.model, config.adapter, run.folder, part)
            if "pipeline" in summary:  # not of a run of an earlier version
                write_card(part, run.folder / "samples", run.config, summary, str(folder))
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    said = f"a {kind} with what run {run.name} trained in its weights is in {folder}"
    off = summary.get("steps_off")  # likewise
    if off:
        steps = ", ".join(map(str, off))
        said += (
            f"; it has it at every step, the run drew step {steps} without (docs/models.md, Steps without the adapter)"
        )
    wide_console().print(said, markup=False, soft_wrap=True)
