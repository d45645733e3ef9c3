"""`pytest -m system`: this machine as a cluster of one, reached by ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sshd on port 22")
def test_ray_submit_runs_a_recipe_to_its_summary() -> None:
    script = Path(__file__).parent / "ray_submit.sh"
    done = subprocess.run(
        ["bash", str(script)], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nsummary.json:" in done.stdout
