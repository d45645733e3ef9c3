from __future__ import annotations

from typing import Any

import pytest

from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import short_run


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a short run in this process."""
    config = short_run(tmp_path_factory.mktemp("local"), name="local")
    RunFolder(config).begin(resume=False)
    engine = Engine(config)
    train(engine, engine.local_rollouts, lambda row: None)
    return RunFolder(config).load_summary()
