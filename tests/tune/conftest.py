from tests.cluster.conftest import cluster  # noqa: F401
