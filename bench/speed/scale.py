"""What coordination costs: the real dispatcher over Ray with simulated rollout actors, and real ones from 1 to 2.

    python -m bench.speed.scale      # about 10 minutes; writes bench/results/scale.json

A simulated actor sleeps instead of computing. It is a slot of one of a few host actors, so every call, theta and result
goes over Ray as it does in a run; or, for the dispatcher's own part, a slot of this process. The same calls without a
dispatcher show Ray's part. Chunks shorter than half a second are called for several at a time, which is measured beside
one by one. An ideal step is the best schedule of the same durations, with no time between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import json
import queue
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import ray
import torch

from bench.common import RESULTS, ROOT, options, write_json
from rlr_ray.cluster import dispatch
from rlr_ray.cluster.coordinator import RunCoordinator
from rlr_ray.cluster.dispatch import Dispatcher
from rlr_ray.cluster.jobs import Fate, Patience, RolloutWorker
from rlr_ray.cluster.rollouts import RolloutActor, RolloutPool, actor_future
from rlr_ray.config.recipe import load_config
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.core.zeroth_order import Directions, RolloutResult
from rlr_ray.train.engine import RolloutRequest

ROLLOUT_S, RESTART_S = 10.0, 5.0
PAIRS = 8  # a chunk, of two rollouts each
PARAMETERS = 100_000
HOSTS = 4
TURNS = 3  # of what is compared
THETA = np.zeros(PARAMETERS, np.float32)
PARTS = ("bytes", "steps", "short", "weak")


class SimulatedDeath(Exception):
    """A slot's actor is gone; it is back after RESTART_S."""


Chunks = Sequence[range]


def outcome(chunks: Chunks, dies: bool) -> list[RolloutResult]:
    if dies:
        raise SimulatedDeath
    return [RolloutResult(indices, [0.0] * len(indices), [0.0] * len(indices)) for indices in chunks]


class Host:
    """Many simulated actors in one process of Ray's."""

    async def run(self, theta: bytes, chunks: Chunks, seconds: float, dies: bool) -> list[RolloutResult]:
        await asyncio.sleep(seconds)
        return outcome(chunks, dies)


class OverRay:
    """Calls to a host."""

    def __init__(self, host: Any):
        self.host = host

    def run(self, request: Any, chunks: Chunks, seconds: float, dies: bool = False) -> Future[list[RolloutResult]]:
        return actor_future(self.host.run.remote(request, chunks, seconds, dies))


Sleeping = tuple[float, int, Chunks, bool, Future[list[RolloutResult]]]


class InProcess:
    """The same without calls: one thread that keeps everyone's time."""

    def __init__(self) -> None:
        self.number = itertools.count()
        self.asked: queue.SimpleQueue[Sleeping] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def run(self, request: Any, chunks: Chunks, seconds: float, dies: bool = False) -> Future[list[RolloutResult]]:
        future: Future[list[RolloutResult]] = Future()
        self.asked.put((time.monotonic() + seconds, next(self.number), chunks, dies, future))
        return future

    def _serve(self) -> None:
        sleeping: list[Sleeping] = []
        while True:
            with contextlib.suppress(queue.Empty):
                heapq.heappush(sleeping, self.asked.get(timeout=0.001))
            while sleeping and sleeping[0][0] <= time.monotonic():
                *_, chunks, dies, future = heapq.heappop(sleeping)
                try:
                    future.set_result(outcome(chunks, dies))
                except SimulatedDeath as death:
                    future.set_exception(death)


class Slot:
    """A simulated actor as the dispatcher sees it; how long it takes and whether it dies follow from its seed."""

    def __init__(self, name: str, host: OverRay | InProcess, *, spread: bool, rollout_s: float = ROLLOUT_S):
        self.name, self.host, self.spread, self.random = name, host, spread, random.Random(name)
        self.rollout_s = rollout_s
        self.died = False
        self.durations: list[float] = []  # of its chunks that went well

    def ready(self) -> Future[Any]:
        return self.host.run(None, [], RESTART_S if self.died else 0.0)

    def run(self, request: Any, chunks: Chunks) -> Future[list[Any]]:
        seconds, dies = self.rollout_s * len(chunks), False
        if self.spread:  # 20 % up or down, 2 % stragglers that take ten times as long, 1 % die half-way
            seconds *= self.random.lognormvariate(0, 0.2) * (10 if self.random.random() < 0.02 else 1)
            dies = self.random.random() < 0.01
        self.durations += [] if dies else [seconds]
        return self.host.run(request, chunks, seconds / 2 if dies else seconds, dies)

    def end(self) -> None:
        raise AssertionError("nothing hangs here")

    def fate(self, error: BaseException) -> Fate:
        self.died = isinstance(error, SimulatedDeath)
        return "lost" if self.died else "failed"


def best_schedule(durations: Sequence[float], actors: int) -> float:
    """Seconds that the chunks take if the longest are handed out first, each to whoever is free first."""
    free = [0.0] * actors
    for seconds in sorted(durations, reverse=True):
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def host_cpu() -> float:
    """CPU seconds of the hosts so far."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True) if "Host" in process.name()]
    return sum(time.user + time.system for time in times)


@contextmanager
def measured(row: dict[str, Any]) -> Iterator[None]:
    """Adds the seconds that the block takes, and the CPU seconds of this process and of the hosts."""
    hosts, before, began = host_cpu(), psutil.Process().cpu_times(), time.monotonic()
    yield
    row["seconds"], after = time.monotonic() - began, psutil.Process().cpu_times()
    row["coordinator_cpu_s"] = after.user + after.system - before.user - before.system
    row["hosts_cpu_s"] = host_cpu() - hosts


def bare_calls(hosts: Sequence[OverRay], actors: int) -> dict[str, Any]:
    """A step of one chunk an actor by calls alone: what Ray takes."""
    row: dict[str, Any] = {"calls": "Ray alone", "actors": actors, "spread": False, "hedge": False, "ideal": ROLLOUT_S}
    with measured(row):
        request = ray.put(THETA)
        calls = [hosts[k % len(hosts)].run(request, [range(k, k + PAIRS)], ROLLOUT_S) for k in range(actors)]
        for call in calls:
            call.result()
    return row


def simulate(
    hosts: Sequence[OverRay | InProcess],
    actors: int,
    rounds: int,
    *,
    spread: bool,
    hedge: bool,
    rollout_s: float = ROLLOUT_S,
) -> dict[str, Any]:
    """A step of `rounds` chunks an actor: the time it takes against the ideal, which knows of no hedges."""
    slots = [Slot(f"{k}", hosts[k % len(hosts)], spread=spread, rollout_s=rollout_s) for k in range(actors)]
    there: Future[Sequence[RolloutWorker] | None] = Future()
    there.set_result(list[RolloutWorker](slots))
    dispatcher = Dispatcher(lambda: there, Patience(hedge_after=2.0 if hedge else None))
    chunks = [range(first, first + PAIRS) for first in range(0, actors * rounds * PAIRS, PAIRS)]
    while len(dispatcher.roster.idle) < actors:
        time.sleep(0.1)
    alone = isinstance(hosts[0], InProcess)
    calls = "dispatcher alone" if alone else "dispatcher over Ray"
    row: dict[str, Any] = {"calls": calls, "actors": actors, "spread": spread, "hedge": hedge}
    with measured(row):
        job = dispatcher.submit(None if alone else ray.put(THETA), chunks, str)
        assert len(list(job)) == len(chunks)
    dispatcher.close()
    durations = [seconds for slot in slots for seconds in slot.durations]
    return row | {"ideal": best_schedule(durations, actors)} | job.counts


def bytes_per_rollout(host: Any, calls: int = 1000) -> dict[str, float]:
    """What one rollout costs on the wire: counted on the loopback device, less what Ray sends when idle."""
    request = ray.put(THETA)
    ray.get(host.run.remote(request, [range(PAIRS)], 0.0, False))

    def count(calls: int) -> tuple[int, float]:
        before, began = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.monotonic()
        for _ in range(calls // 50):
            ray.get([host.run.remote(request, [range(PAIRS)], 0.0, False) for _ in range(50)])
        if not calls:
            time.sleep(3.0)
        return psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before, time.monotonic() - began

    idle, idle_s = count(0)
    busy, busy_s = count(calls)
    rollouts = 2 * PAIRS * calls
    return {"pairs_per_chunk": PAIRS, "wire": (busy - idle * busy_s / idle_s) / rollouts, "theta": 4 * PARAMETERS}


def weak_scaling(folder: Path) -> list[dict[str, float]]:
    """Rollouts of the demo's job on 1 and on 2 real actors, each with the same work."""
    config = load_config(str(ROOT / "configs" / "digits.yaml"), ["device=cpu", f"output_dir={folder}"])
    actors = {
        str(k): ray.remote(RolloutActor).options(num_cpus=0).remote(config, str(ROOT), generator_checksum(), {})
        for k in range(2)
    }
    ray.get([actor.ready.remote() for actor in actors.values()])
    parameters = 576  # of the recipe's adapter
    request = RolloutRequest(0, config.plan_shape.draw(0), torch.zeros(parameters), Directions(parameters, 0.01))
    rows = []
    for turn in range(3):
        for count in (1, 2):
            coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote()
            ray.get(coordinator.set_actors.remote([ray.put(dict(list(actors.items())[:count]))]))
            pool = RolloutPool(coordinator, Patience(hedge_after=None), 0)
            chunks = [range(20 * k, 20 * k + 20) for k in range(4 * count)]
            list(pool(request, chunks[:count]).results)  # who the actors are is known, kernels are warm
            began = time.monotonic()
            list(pool(request, chunks).results)
            pool.close()
            rows.append({"turn": turn, "actors": count, "seconds": time.monotonic() - began, "pairs": 80 * count})
    return rows


def steps(hosts: list[OverRay], counts: list[int]) -> Iterator[dict[str, Any]]:
    """Every row of the table."""
    most = max(counts)
    yield simulate([InProcess()], most, 1, spread=False, hedge=False)
    bare_calls(hosts, most)  # a host's first thousand calls take it longer
    for _ in range(TURNS):
        yield bare_calls(hosts, most)
        yield simulate(hosts, most, 1, spread=False, hedge=False)
    for actors in sorted(set(counts) - {most}):
        yield simulate(hosts, actors, 1, spread=False, hedge=False)
    unhedged = simulate(hosts, most, 2, spread=True, hedge=False)
    yield unhedged
    yield simulate(hosts, most, 2, spread=True, hedge=True) | {"ideal": unhedged["ideal"]}


def short_chunks(hosts: Sequence[OverRay], actors: int = 16, chunks: int = 2000, chunk_s: float = 0.05) -> list[Any]:
    """Many short chunks, called for one by one and several at a time, in turn."""
    rows = []
    for _ in range(TURNS):
        for call_s in (0.0, dispatch._CALL_S):
            with patch.object(dispatch, "_CALL_S", call_s):
                one = simulate(hosts, actors, chunks // actors, spread=False, hedge=False, rollout_s=chunk_s)
            rows.append(one | {"chunk_s": chunk_s, "together": bool(call_s)})
            print(rows[-1], flush=True)
    return rows


@contextmanager
def own_ray() -> Iterator[None]:
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--actors", type=int, nargs="+", default=[8, 64, 256, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="others stay as they were kept")
    args = parser.parse_args()
    facts: dict[str, Any] = {"rollout_s": ROLLOUT_S, "ray": ray.__version__, "rows": []}
    if set(args.parts) != {*PARTS}:
        facts = json.loads(args.out.read_text("utf-8"))
    with own_ray():
        hosts = [ray.remote(Host).options(num_cpus=0.1, max_concurrency=1000).remote() for _ in range(HOSTS)]
        ray.get([host.run.remote(ray.put(THETA), [range(PAIRS)], 0.0, False) for host in hosts])  # all is imported
        over_ray = [OverRay(host) for host in hosts]
        if "bytes" in args.parts:
            facts["bytes"] = bytes_per_rollout(hosts[0])
            print(facts["bytes"], flush=True)
        if "steps" in args.parts:
            facts["rows"] = []
            for row in steps(over_ray, args.actors):
                print(row, flush=True)
                facts["rows"] += [row]
        if "short" in args.parts:
            facts["short"] = short_chunks(over_ray)
        if "weak" in args.parts:
            facts["weak_scaling"] = weak_scaling(args.out.parent)
    write_json(args.out, facts)
    one, two = (
        statistics.median(row["seconds"] for row in facts["weak_scaling"] if row["actors"] == count) for count in (1, 2)
    )
    print(f"real actors, the same work each: 1 takes {one:.2f} s, 2 take {two:.2f} s: efficiency {one / two:.2f}")


if __name__ == "__main__":
    main()
