"""`make demo`'s job on this machine's GPU, or on a CPU, in one process: `python bench/demo.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import Kept, options, rounded  # beside this file, as the next
from sizes import DEVICE
from whole_runs import ROOT

KEPT = ("steps", "reward_before", "reward_after", "gain", "gain_se", "seconds")


def demo(*keys: str, checkout: Path = ROOT) -> dict[str, Any]:
    """Seconds of the command from start to finish, and what the run's summary says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlr_ray", "train", "--config", "configs/digits.yaml"]
        command += [word for key in (*keys, f"output_dir={folder}") for word in ("--set", key)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        began = time.monotonic()
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        taken = time.monotonic() - began
        summary = json.loads((Path(folder) / "digits" / "summary.json").read_text())
    return {"start_to_finish": rounded(taken)} | {name: summary[name] for name in KEPT}


def main() -> None:
    given = options(__doc__)
    kept = Kept("demo", "digits", {}, given.limit_s)
    kept.row("demo", lambda: demo("cluster=none", f"device={DEVICE.type}"))


if __name__ == "__main__":
    main()
