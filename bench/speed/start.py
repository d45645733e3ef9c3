"""CPU seconds from `rlr-ray train` to its first update, of its process and all below it: in one process, and on Ray."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.common import ROOT, options


def until_first_update(cluster: str) -> float:
    """CPU seconds of the embedded digits' recipe, with next to no evaluation before it."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["train.iterations=1", "evaluation.chains=2", "name=first", f"output_dir={folder}", f"cluster={cluster}"]
        words = [word for key in keys for word in ("--set", key)]
        command = [sys.executable, "-m", "rlr_ray", "train", "--config", "configs/digits.yaml", *words]
        run, rows, spent = psutil.Popen(command, cwd=ROOT), Path(folder, "first", "metrics.jsonl"), dict[int, float]()
        while not (rows.is_file() and rows.stat().st_size) and run.poll() is None:
            spent |= _seconds(run)
            time.sleep(0.1)
        spent |= _seconds(run)
        if run.wait():
            raise subprocess.CalledProcessError(run.returncode, command)
        return sum(spent.values())


def _seconds(run: psutil.Popen) -> dict[int, float]:
    """CPU seconds so far, by process."""
    found = dict[int, float]()
    for process in (run, *run.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = times.user + times.system
    return found


def main() -> None:
    parser = options(__doc__)
    parser.parse_args()
    for name, cluster in {"in one process": "none", "on Ray": "{}"}.items():
        print(f"{name}: {until_first_update(cluster):.1f} CPU s until the first update", flush=True)


if __name__ == "__main__":
    main()
