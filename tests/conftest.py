from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads that wait for each other burn twice the CPU seconds


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests of a session that ask for it."""
    import rlr_ray.cluster  # sets Ray's environment before Ray is imported  # noqa: F401

    import ray  # isort: skip

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()
