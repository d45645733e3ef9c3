from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray for all tests of a session."""
    from rlr_ray.cluster import launch  # noqa: F401  # sets Ray's environment before Ray is imported

    import ray  # isort: skip

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()
