"""What the benches of speed share: seconds, peak memory and arithmetic of a piece of work, and results that are kept.

A result file is of one bench at one size on one kind of device: bench/results/speed/<bench>_<size>_<device>.json. Its
rows are written as they come. A row that is there is not measured again, unless the package, torch or the machine has
changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.common import RESULTS, ROOT, options, write_json
from bench.models import DEVICE, SIZES
from rlr_ray.errors import OutOfMemory
from rlr_ray.train.engine import Engine
from rlr_ray.utils.memory import GIB, peak_bytes

SPEED = RESULTS / "speed"
# Dense bfloat16 TFLOP/s that the makers state, by the start of the device's name.
PEAKS = {
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100": 312,
}
Part = Callable[[], Any]
Clock = Callable[[], float]
# On a CPU the seconds that this process had it, so that what else runs there does not count.
CLOCK: Clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time


def wait() -> None:
    """Until the device has done what it was asked."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(part: Part, clock: Clock = CLOCK) -> float:
    wait()
    began = clock()
    part()
    wait()
    return clock() - began


def rounded(value: float) -> float:
    """To five digits: what is measured has no more."""
    return float(f"{value:.5g}")


def measure(part: Part, turns: int = 3, budget_s: float = 15) -> dict[str, float]:
    """Arithmetic (of a first run), peak memory beyond what is loaded (of a second), and the least seconds of the next.

    Of these there are `turns`, fewer if they take longer than the budget, at least one.
    """
    with FlopCounterMode(display=False) as counter:
        part()
    peak = peak_bytes(part, DEVICE) / GIB
    taken: list[float] = []
    while len(taken) < turns and sum(taken) < budget_s:
        taken.append(seconds(part))
    tflop = counter.get_total_flops() / 1e12
    return {"seconds": rounded(min(taken)), "peak_gib": rounded(peak), "tflop": rounded(tflop)}


def interleaved(
    parts: Mapping[str, Part], turns: int, *, clock: Clock = CLOCK, budget_s: float = 60
) -> dict[str, list[float]]:
    """Seconds of every part in every turn, after one that is not counted; at least two turns, whatever the budget."""
    for part in parts.values():
        part()
    taken: dict[str, list[float]] = {name: [] for name in parts}
    began = time.perf_counter()
    for turn in range(turns):
        if turn >= 2 and time.perf_counter() - began > budget_s:
            break
        for name, part in parts.items():
            taken[name].append(rounded(seconds(part, clock)))
    return taken


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the turns of one part's seconds over another's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def machine() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} {platform.machine()} cores, one thread a process"


def peak_tflops() -> float | None:
    """What the maker states; None if it is not known here."""
    return next((peak for name, peak in PEAKS.items() if machine().startswith(name)), None)


def product_tflops() -> float:
    """What a large matrix product reaches on this device: in bfloat16 on a GPU, else in float32."""
    size, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    (taken,) = interleaved({"product": lambda: left @ right}, 10).values()
    return 2 * size**3 / min(taken) / 1e12


def code() -> str:
    """Short name of the package's source: results of another are not these."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "rlr_ray").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def facts_of(engine: Engine) -> dict[str, Any]:
    """What a page says of the model that was measured."""
    pipeline, sampler = engine.model.pipeline, engine.config.sampler  # type: ignore[attr-defined]
    trained = len(engine.model.initial_theta)
    return {
        "denoiser_parameters": sum(p.numel() for p in pipeline.unet.parameters()) - trained,
        "trained_numbers": trained,
        "weights_gib": rounded(engine.held_bytes() / GIB),
        "steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "latent": list(engine.model.latent_shape),
    }


class Kept:
    """The result file of one bench at one size on this device."""

    def __init__(self, bench: str, size: str, facts: Mapping[str, Any], limit_s: float):
        self.file = SPEED / f"{bench}_{size}_{DEVICE.type}.json"
        self.stop = time.monotonic() + limit_s
        same = {"machine": machine(), "torch": torch.__version__, "diffusers": diffusers.__version__, "code": code()}
        same |= {"size": size, "device": DEVICE.type, **facts}
        self.facts = json.loads(self.file.read_text()) if self.file.exists() else {}
        if any(self.facts.get(name) != value for name, value in same.items()):
            now = {"date": datetime.now(UTC).date().isoformat(), "peak_tflops": peak_tflops()}
            now |= {"load": os.getloadavg()[0]}  # before this process adds to it
            self.facts = same | now | {"product_tflops": rounded(product_tflops()), "rows": {}}

    def row(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Make and keep a row, unless it is there or the time is over."""
        rows = self.facts["rows"]
        if name in rows:
            print(f"{name}: measured already", flush=True)
            return
        if time.monotonic() > self.stop:
            print(f"{name}: left for another run", flush=True)
            return
        try:
            rows[name] = make()
        except (torch.OutOfMemoryError, OutOfMemory):
            rows[name] = {"out_of_memory": True}
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        write_json(self.file, self.facts)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)


def arguments(doc: str | None, sizes: Collection[str] = SIZES, **defaults: Any) -> argparse.Namespace:
    """A bench's words: its size, the last one unless said, how long it may go on, and what is its own."""
    parser = options(doc)
    parser.add_argument("--size", choices=sizes, default=[*sizes][-1])
    parser.add_argument("--limit-s", type=float, default=240, help="no row is begun after this many seconds")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()
