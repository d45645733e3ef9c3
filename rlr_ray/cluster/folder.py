"""Every process works where the driver does, so that relative paths and a user's own modules mean the same."""

from __future__ import annotations

import os
import platform

from rlr_ray.errors import UserError


def enter(folder: str) -> None:
    """Change to the driver's working folder. Raises UserError if this node does not have it."""
    if not os.path.isdir(folder):
        raise UserError(
            f"node {platform.node()} has no folder {folder}, where the run was started; every node needs the run's "
            "files at the same path (file_mounts in cluster.yaml, or a shared disk)"
        )
    os.chdir(folder)
