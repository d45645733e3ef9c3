"""What a run needs of the machines it runs on, looked at before it starts: one machine's report, and verdicts."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.utils.environment import versions

_GIB = 2**30
_LEAST_DISK_GIB, _LEAST_MEMORY_GIB = 1.0, 1.0


@dataclass(frozen=True)
class MachineReport:
    """One machine as a process on it sees it."""

    name: str
    versions: Mapping[str, str]
    checksum: float  # of random numbers
    disk_gib: float  # free, where the run's folder is or will be
    memory_gib: float  # free
    unwritable: str  # why the run's folder cannot be written to; "" if it can, or need not
    shares_folder: bool  # it sees what the driver left there, or need not
    starts_there: bool  # it has the folder where the run is started
    gpus: bool
    cuda: str  # of torch's build; "" without


@dataclass(frozen=True)
class Verdict:
    """A judgement of one thing: whether it is well, how it is, and else the remedy."""

    ok: bool
    what: str
    state: str
    remedy: str = ""


def examine(name: str, folder: str, token: str, start: str) -> MachineReport:
    """This machine's report.

    `folder`: where the run's would be, "" if nothing is written here; `token`: a file that the driver left there;
    `start`: the folder where the run is started.
    """
    return MachineReport(
        name,
        versions(),
        generator_checksum(),
        shutil.disk_usage(_existing(Path(folder or start))).free / _GIB,
        psutil.virtual_memory().available / _GIB,
        _write_error(Path(folder)) if folder else "",
        not folder or (Path(folder) / token).is_file(),
        Path(start).is_dir(),
        Path("/dev/nvidiactl").exists(),
        torch.version.cuda or "",
    )


@contextmanager
def left_token(folder: Path) -> Iterator[str]:
    """The name of a file in the folder, for others to see whether theirs is the same one; "" if it cannot be left."""
    token = folder / f".doctor-token-{platform.node()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text("")
    except OSError:
        yield ""
        return
    try:
        yield token.name
    finally:
        token.unlink()


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _write_error(folder: Path) -> str:
    file = folder / f".doctor-{platform.node()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        file.unlink()
    except OSError as error:
        return str(error)
    return ""


def judge(config: RunConfig, driver: MachineReport, others: Sequence[MachineReport]) -> list[Verdict]:
    """What the reports say: `others` are of the nodes that workers and rollout actors may run on."""
    reports = (driver, *others)
    return [
        _device(config),
        _same(
            "versions",
            {r.name: " ".join(map(" ".join, r.versions.items())) for r in reports},
            "install the same packages",
        ),
        _same("random numbers", {r.name: f"{r.checksum!r}" for r in reports}, "install the same torch"),
        _storage(config, reports),
        _start(others),
        _enough("free disk", {r.name: r.disk_gib for r in reports}, _LEAST_DISK_GIB, "free some, or set output_dir"),
        _enough("free memory", {r.name: r.memory_gib for r in reports}, _LEAST_MEMORY_GIB, "end other processes"),
    ]


def _device(config: RunConfig) -> Verdict:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.cluster == "none" and config.device == "cuda" and not there:
        return Verdict(False, "device", "config says cuda, torch finds none", "set device: auto or cpu")
    return Verdict(True, "device", f"{config.device}; {there} CUDA devices on this machine")


def _same(what: str, values: Mapping[str, str], remedy: str) -> Verdict:
    if len(set(values.values())) == 1:
        return Verdict(True, what, next(iter(values.values())))
    listed = "; ".join(f"{name}: {value}" for name, value in values.items())
    return Verdict(False, what, f"they differ: {listed}", f"{remedy} on every node (constraints.txt)")


def _storage(config: RunConfig, reports: Sequence[MachineReport]) -> Verdict:
    broken = {report.name: report.unwritable for report in reports if report.unwritable}
    apart = [report.name for report in reports if not report.unwritable and not report.shares_folder]
    folder = config.folder.parent
    if broken:
        listed = "; ".join(f"{name}: {why}" for name, why in broken.items())
        return Verdict(False, "storage", f"{folder} cannot be written to on {listed}", "set output_dir to one that can")
    if apart:
        return Verdict(
            False,
            "storage",
            f"{folder} on {', '.join(apart)} is another folder than on the driver's node",
            "set output_dir to a disk that every node shares, or keep the workers on the driver's node "
            "(cluster.worker.resources)",
        )
    return Verdict(True, "storage", f"{folder} can be written to wherever workers run")


def _start(others: Sequence[MachineReport]) -> Verdict:
    without = [report.name for report in others if not report.starts_there]
    if without:
        state = f"{', '.join(without)} has no folder {Path.cwd()}"
        return Verdict(False, "start", state, "the run's files are needed there too: file_mounts, or a shared disk")
    return Verdict(True, "start", f"every node has {Path.cwd()}")


def _enough(what: str, values: Mapping[str, float], least: float, remedy: str) -> Verdict:
    listed = ", ".join(f"{name} {amount:.1f} GiB" for name, amount in values.items())
    return Verdict(min(values.values()) >= least, what, listed, f"at least {least:g} GiB; {remedy}")
