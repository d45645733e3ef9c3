"""From cluster.local.yaml a cluster file for tests/system/ray_submit.sh, which says why."""

from __future__ import annotations

import getpass
import socket
import sys
from pathlib import Path

import yaml


def derive(config: dict, work: Path, bin_folder: str) -> dict:
    """The environment in `bin_folder`, ports of its own and no `ray stop`; the keys of the folder `work`."""
    pip = [command for command in config["setup_commands"] if "~/venv" in command]
    kept = [command for command in config["setup_commands"] if command not in pip]
    environment = f"export RAY_AUTH_MODE=token PYTHONPATH=~/rlr_ray_project PATH={bin_folder}:$PATH; cd ~"
    assert len(pip) == 4 and len(kept) == 1, "cluster.local.yaml has other set-up commands than this script expects"
    stop, start = config["head_start_ray_commands"]
    assert stop == "ray stop"
    ports = ["dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port"]
    flags = " ".join(f"--{flag}={port}" for flag, port in zip(ports, free_ports(len(ports)), strict=True))
    return config | {
        "cluster_name": work.name,
        "auth": {"ssh_user": getpass.getuser(), "ssh_private_key": str(work / "key")},
        "setup_commands": [*kept, f"echo '{environment}' >> ~/.bashrc"],
        "head_start_ray_commands": [start.replace("--port=6379", f"--port={free_ports(1)[0]} --num-cpus=2 {flags}")],
    }


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    source, work, bin_folder = sys.argv[1:]
    print(yaml.safe_dump(derive(yaml.safe_load(Path(source).read_text()), Path(work), bin_folder), width=1000))
