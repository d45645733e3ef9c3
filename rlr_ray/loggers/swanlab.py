"""SwanLab; SWANLAB_API_KEY, SWANLAB_MODE and the like are its own."""

from __future__ import annotations

import uuid
from typing import Any

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.tracker import Tracker


class SwanLab(Tracker):
    """`options`: more arguments of swanlab.init, such as workspace, tags, mode: offline."""

    def __init__(self, project: str = "rlr-ray", **options: Any):
        self.options = {"project": project} | options

    def start(self, config: RunConfig, id: str | None) -> str:
        import swanlab

        self.package = swanlab
        arguments = {
            "name": config.name,
            "log_dir": str(config.folder / "swanlab"),
            "config": config.model_dump(mode="json"),
        }
        self.run = swanlab.init(**arguments | self.options, id=id or uuid.uuid4().hex[:21], resume="allow")
        self.link = self.run.url if self.run.mode == "online" else str(self.run.dir)
        return str(self.run.id)
