"""Weights & Biases; WANDB_API_KEY, WANDB_MODE and the like are its own."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.tracker import PATIENCE_S, Tracker


class WandB(Tracker):
    """`options`: more arguments of wandb.init, such as entity, group, tags, mode: offline."""

    def __init__(self, project: str = "rlr-ray", **options: Any):
        self.options = {"project": project} | options

    def start(self, config: RunConfig, id: str | None) -> str:
        import wandb

        self.package = wandb
        # Without a limit the process would not end before a server is there again.
        settings = wandb.Settings(silent=True, console="off", finish_timeout=PATIENCE_S)
        arguments = {
            "name": config.name,
            "dir": config.folder,
            "config": config.model_dump(mode="json"),
            "settings": settings,
        }
        self.run = wandb.init(**arguments | self.options, id=id or uuid.uuid4().hex, resume="allow")
        self.link = self.run.url or str(Path(self.run.dir).parent)
        return str(self.run.id)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({name: one for name, one in summary.items() if isinstance(one, str | int | float)})
        self.run.finish()
