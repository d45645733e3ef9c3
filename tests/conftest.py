from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rlr_ray.utils.environment import set_variables

os.environ["OMP_NUM_THREADS"] = "1"  # as recipes have, and two threads that wait burn twice the CPU seconds
set_variables()  # before Ray is imported


@pytest.fixture
def nothing_shown() -> Iterator[None]:
    """For runs by commands whose report and pictures nobody looks at: half of a small run's time."""
    from tests.runs import nothing_shown

    with nothing_shown():
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests of a session that ask for it."""
    import ray

    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # as where a run starts its own Ray: a process less a run
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()
