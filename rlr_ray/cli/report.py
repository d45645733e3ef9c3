"""`rlr-ray report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlr_ray.config.recipe import output_dir_of
from rlr_ray.errors import UserError
from rlr_ray.evaluation.compare import comparison_parts
from rlr_ray.evaluation.followed import Followed, read_runs, run_folders
from rlr_ray.loggers.html import report_parts
from rlr_ray.loggers.page import write_page
from rlr_ray.utils.console import wide_console
from rlr_ray.utils.environment import path_of
from rlr_ray.utils.files import disk_errors


@disk_errors()
def report_command(options: argparse.Namespace) -> None:
    output_dir = output_dir_of(options.set)
    runs = read_runs(run_folders(options.runs, output_dir))
    if not runs:
        raise UserError(f"no run lies in {', '.join(options.runs)}; name runs, or a folder that has some")
    out = Path(options.out) if options.out else _place(runs, path_of(output_dir))
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another place")
    if len(runs) > 1:
        write_page(out, ", ".join(run.name for run in runs), comparison_parts(runs))
    else:
        (run,) = runs
        write_page(out, run.name, report_parts(run.config, run.rows, run.shown, run.state))
    wide_console().print(f"report of {', '.join(run.name for run in runs)}: {out}", markup=False, soft_wrap=True)


def _place(runs: Sequence[Followed], output_dir: Path) -> Path:
    """A run's page lies in its folder, that of several beside them."""
    return (runs[0].folder if len(runs) == 1 else output_dir) / "report.html"
