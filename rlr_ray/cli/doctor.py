"""`rlr-ray doctor`."""

from __future__ import annotations

import argparse
import os

from rlr_ray.cluster.machine import Verdict, examine, judge, left_token
from rlr_ray.config.recipe import load_config
from rlr_ray.config.run import RunConfig
from rlr_ray.utils.console import wide_console


def doctor_command(options: argparse.Namespace) -> int:
    """0, or 1 if something is not well."""
    console = wide_console()
    config = load_config(options.config, options.set)
    verdicts = _examine(config)
    for verdict in verdicts:
        mark, style = ("ok", "green") if verdict.ok else ("NOT WELL", "bold red")
        remedy = "" if verdict.ok else f"; {verdict.remedy}"
        console.print(f"{mark}: {verdict.what}: {verdict.state}{remedy}", style=style, markup=False, soft_wrap=True)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _examine(config: RunConfig) -> list[Verdict]:
    with left_token(config.folder.parent) as token:
        driver = examine("this machine", str(config.folder.parent), token, os.getcwd())
        if config.cluster == "none":
            return judge(config, driver, [])
        from rlr_ray.cluster.doctor import examine_cluster  # only here, so that all else works without Ray

        reports, verdicts = examine_cluster(config, config.cluster, token)
    return judge(config, driver, reports) + verdicts
