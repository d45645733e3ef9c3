"""The first cluster.yaml is one that Ray's cluster launcher accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.ray
def test_cluster_yaml_passes_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))


def test_what_cluster_yaml_mounts_is_there() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert (ROOT / config["file_mounts"]["~/rlr_ray_project"] / "constraints.txt").is_file()
    assert (ROOT / "train.py").is_file()
