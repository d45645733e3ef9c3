"""`ray job submit` to a head that listens on this machine only and asks for a token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.system.derive import free_ports

pytest.importorskip("aiohttp_cors", reason="needs ray[default]: pip install -e '.[cluster]'")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    url: str
    port: int
    environment: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as cluster.local.yaml does, in a folder of its own, which also is its user's home."""
    folder = Path(tempfile.mkdtemp(prefix="rlr_job_", dir="/tmp"))  # short: Ray's sockets are in it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(folder), "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "token"}
    environment |= {"PATH": f"{Path(RAY).parent}:{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    port, *others = free_ports(5)
    flags = ["port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    start = [RAY, "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    start += [f"--{flag}={value}" for flag, value in zip(flags, others, strict=True)]
    refused = subprocess.run(start, env=environment, capture_output=True, text=True)
    assert refused.returncode and "no authentication token was found" in refused.stderr
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield Head(f"http://127.0.0.1:{port}", port, environment, folder)
    finally:
        process.terminate()
        process.wait(60)
        for left in of_head(folder):
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def of_head(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_job_runs_to_its_summary_and_strangers_are_refused(head: Head) -> None:
    command = [RAY, "job", "submit", "--address", head.url, "--working-dir", str(ROOT), "--"]
    command += ["python", "train.py", "--config", "configs/digits.yaml"]
    for override in (
        f"output_dir={head.folder / 'runs'}",
        "name=job",
        "train.iterations=1",
        "evaluation.chains=20",
        "evaluation.pictures=4",
    ):
        command += ["--set", override]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    summary = json.loads((head.folder / "runs" / "job" / "summary.json").read_text())
    assert "TorchTrainer of 1 worker(s)" in summary["ran_on"]

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=10)
    listening = {
        each.laddr.ip
        for process in of_head(head.folder)
        for each in process.net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == head.port
    }
    assert listening == {"127.0.0.1"}
