"""What the server of forked test processes imports: it has built an engine once, so that they start at once."""

from __future__ import annotations

from pathlib import Path

import tests.train.test_checkpoints  # noqa: F401  # the functions that they call
from rlr_ray.train.engine import Engine
from tests.runs import small_run

Engine(small_run(Path("nowhere")))
