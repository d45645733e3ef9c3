"""`rlr-ray push`: what a run trained, with its model card, as a repository of the Hugging Face hub."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rlr_ray.errors import UserError, first_line
from rlr_ray.evaluation.runs import Run, finished_run
from rlr_ray.loggers.card import write_card
from rlr_ray.rewards.hub import DEFECTS
from rlr_ray.utils.console import wide_console


def push_command(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi, get_token

    run = finished_run(options.run, options.set)
    if get_token() is None:
        raise UserError(
            "no token for the Hugging Face hub is here; allowed: one that may write; make one at "
            "https://huggingface.co/settings/tokens, then call `hf auth login`, or set HF_TOKEN"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        leave_files(run, folder, options.repo)
        try:
            api = HfApi()
            url = api.create_repo(options.repo, private=options.private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f"rlr_ray: run {run.name}")
        except DEFECTS:
            raise
        except Exception as error:  # of network, names and access
            raise UserError(
                f"{options.repo!r} could not be written on the hub: {first_line(error)}; give OWNER/NAME of a "
                "repository that your token may write, or send the files yourself: `hf upload REPO FOLDER`, of "
                f"{run.folder / _adapter_folder(run)}"
            ) from error
    wide_console().print(f"run {run.name} is at {url}", markup=False, soft_wrap=True)


def leave_files(run: Run, folder: Path, repo: str) -> None:
    """What is pushed: the adapter's folder, its card loading it from the repository. Needs no network."""
    shutil.copytree(run.folder / _adapter_folder(run), folder)
    write_card(folder, run.folder / "samples", run.config, _summary(run), repo)


def _summary(run: Run) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text("utf-8"))
    if "pipeline" not in summary:
        raise UserError(
            f"run {run.name} was made by an earlier version, which left nothing to write its model card from; end "
            f"it once more: rlr-ray train --resume {run.name}"
        )
    return summary


def _adapter_folder(run: Run) -> str:
    return Path(_summary(run)["adapter"]).parts[0]
