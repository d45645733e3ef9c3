"""`ray job submit` to a head that listens on this machine only and asks for a token."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

from tests.system.derive import free_ports

pytest.importorskip("aiohttp_cors", reason="needs ray[default]: pip install -e '.[cluster]'")
pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    url: str
    port: int  # of the dashboard
    client_port: int  # of the server for Ray's client, which nobody here uses
    environment: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as cluster.local.yaml does, in a folder of its own, which also is its user's home."""
    folder = Path(tempfile.mkdtemp(prefix="rlr_job_"))  # short: Ray's sockets are in it
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
    log = folder / "head.log"
    process = subprocess.Popen(start, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
    try:
        wait_for(port, process)
        yield Head(f"http://127.0.0.1:{port}", port, others[1], environment, folder)
    finally:
        process.terminate()
        process.wait(60)
        print(log.read_text())  # pytest shows it if a test failed
        for left in of_head(folder):
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the dashboard, which takes the jobs, accepts a connection."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the head ended, or took more than 300 s")


def of_head(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_job_runs_to_its_summary(head: Head) -> None:
    command = [RAY, "job", "submit", "--address", head.url, "--working-dir", str(ROOT), "--"]
    command += ["python", "train.py", "--config", "configs/digits.yaml"]
    changes = ["name=job", "train.iterations=1", "train.chains=40"]
    changes += ["estimator.zeroth_order.count=40", "evaluation.chains=20", "evaluation.pictures=4"]
    for change in [f"output_dir={head.folder / 'runs'}", *changes]:
        command += ["--set", change]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    summary = json.loads((head.folder / "runs" / "job" / "summary.json").read_text())
    assert "TorchTrainer of 1 worker(s)" in summary["ran_on"]


def test_who_has_no_token_is_refused(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=10)
    with grpc.insecure_channel(f"127.0.0.1:{head.client_port}") as channel:
        stub = ray_client_pb2_grpc.RayletDriverStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ClusterInfo(ray_client_pb2.ClusterInfoRequest(), timeout=60, wait_for_ready=True)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_dashboard_listens_on_this_machine_only(head: Head) -> None:
    listening = {
        each.laddr.ip
        for process in of_head(head.folder)
        for each in process.net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == head.port
    }
    assert listening == {"127.0.0.1"}
