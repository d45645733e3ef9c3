"""Trackio: on this machine, in TRACKIO_DIR, or in a Hugging Face Space (`space_id`)."""

from __future__ import annotations

import uuid
from typing import Any

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.tracker import Tracker


class Trackio(Tracker):
    """`options`: more arguments of trackio.init, such as space_id."""

    def __init__(self, project: str = "rlr-ray", **options: Any):
        self.options = {"project": project, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False} | options

    def start(self, config: RunConfig, id: str | None) -> str:
        import trackio

        self.package = trackio
        name = id or f"{config.name}-{uuid.uuid4().hex[:8]}"  # it knows runs by their names
        self.run = trackio.init(**self.options, name=name, config=config.model_dump(mode="json"), resume="allow")
        space = self.options.get("space_id")
        self.link = f"https://huggingface.co/spaces/{space}" if space else f"trackio show --project {self.run.project}"
        return name
