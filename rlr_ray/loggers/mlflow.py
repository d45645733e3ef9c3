"""MLflow; MLFLOW_TRACKING_URI and the like are its own."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.tracker import Tracker


class MLflow(Tracker):
    """`tracking_uri`: of a server, or of a database or folder here; None: MLFLOW_TRACKING_URI, or MLflow's default."""

    def __init__(self, experiment: str = "rlr-ray", tracking_uri: str | None = None):
        self.experiment, self.uri = experiment, tracking_uri

    def start(self, config: RunConfig, id: str | None) -> str:
        import mlflow
        from mlflow.entities import Metric

        self.metric, self.client = Metric, mlflow.MlflowClient(self.uri)
        known = self.client.get_experiment_by_name(self.experiment)
        place = known.experiment_id if known else self.client.create_experiment(self.experiment)
        if id is None:
            self.id = self.client.create_run(place, run_name=config.name).info.run_id
            self.client.log_dict(self.id, config.model_dump(mode="json"), "config.yaml")
        else:
            self.id = id
            self.client.update_run(self.id, status="RUNNING")
        uri = re.sub("//[^/]*@", "//", self.client.tracking_uri)  # who logs in, and how, is for no file
        self.link = f"{uri}/#/experiments/{place}/runs/{self.id}" if uri.startswith("http") else uri
        return self.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.id, [self.metric(name, value, now, step) for name, value in values.items()])

    def picture(self, step: int, name: str, file: Path) -> None:
        self.client.log_artifact(self.id, str(file), name)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.client.log_dict(self.id, dict(summary), "summary.json")
        self.client.set_terminated(self.id)
