"""What coordination costs: the real dispatcher over Ray with simulated rollout actors, and real ones from 1 to 2.

    python bench/scale.py            # about 6 minutes; writes bench/results/scale.json

A simulated actor is a slot of one of a few host actors that sleeps instead of computing, so every call, theta and
result goes over Ray as it does in a run. An ideal step takes as long as its chunks do with no time between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from page import RESULTS  # beside this file

from rlr_ray.cluster.dispatch import Dispatcher
from rlr_ray.cluster.jobs import Patience
from rlr_ray.cluster.mailbox import Mailbox
from rlr_ray.cluster.members import Fate, Member
from rlr_ray.cluster.rollouts import RolloutActor, RolloutPool, actor_future
from rlr_ray.core.gradient import RolloutResult
from rlr_ray.core.plan import PlanShape
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.core.zeroth_order import Directions
from rlr_ray.engine import RolloutRequest
from rlr_ray.recipes import load_config

ROOT = Path(__file__).resolve().parent.parent
ROLLOUT_S, RESTART_S = 10.0, 5.0
PAIRS = 8  # a chunk, of two rollouts each
PARAMETERS = 100_000
HOSTS = 4
REQUEST = RolloutRequest(0, PlanShape(50, 1, 2).draw(0), torch.zeros(PARAMETERS), Directions(PARAMETERS, 0.01))


class SimulatedDeath(Exception):
    """A slot's actor is gone; it is back after RESTART_S."""


class Host:
    """Many simulated actors in one process."""

    async def ready(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def run(self, request: RolloutRequest, indices: range, seconds: float, dies: bool) -> RolloutResult:
        await asyncio.sleep(seconds)
        if dies:
            raise SimulatedDeath
        return RolloutResult(indices, torch.zeros(len(indices)), torch.zeros(len(indices)))


class Slot:
    """A simulated actor as the dispatcher sees it; how long it takes and whether it dies follow from its seed."""

    def __init__(self, name: str, host: Any, *, spread: bool):
        self.name, self.host, self.spread, self.random = name, host, spread, random.Random(name)
        self.died = False

    def ready(self) -> Future[None]:
        return actor_future(self.host.ready.remote(RESTART_S if self.died else 0.0))

    def run(self, request: Any, chunk: range) -> Future[RolloutResult]:
        seconds, dies = ROLLOUT_S, False
        if self.spread:  # 20 % up or down, 2 % stragglers that take three times as long, 1 % die half-way
            seconds *= self.random.lognormvariate(0, 0.2) * (3 if self.random.random() < 0.02 else 1)
            dies = self.random.random() < 0.01
        return actor_future(self.host.run.remote(request, chunk, seconds / 2 if dies else seconds, dies))

    def end(self) -> None:
        raise AssertionError("nothing hangs here")

    def fate(self, error: BaseException) -> Fate:
        self.died = isinstance(error, SimulatedDeath)
        return "lost" if self.died else "failed"


def simulate(hosts: Sequence[Any], actors: int, rounds: int, *, spread: bool, hedge: bool) -> dict[str, Any]:
    """Steps of `rounds` chunks an actor: the time they take against the ideal."""
    slots: list[Member] = [Slot(f"{k}", hosts[k % len(hosts)], spread=spread) for k in range(actors)]
    there: Future[Sequence[Member] | None] = Future()
    there.set_result(slots)
    dispatcher = Dispatcher(lambda: there, Patience(hedge_after=2.0 if hedge else None), print)
    chunks = [range(first, first + PAIRS) for first in range(0, actors * rounds * PAIRS, PAIRS)]
    while len(dispatcher.idle) < actors:
        time.sleep(0.1)
    cpu, began = psutil.Process().cpu_times(), time.monotonic()
    job = dispatcher.submit(ray.put(REQUEST), chunks, str)
    assert len(list(job)) == len(chunks)
    seconds = time.monotonic() - began
    used = psutil.Process().cpu_times()
    row = {"actors": actors, "rounds": rounds, "spread": spread, "hedge": hedge, "seconds": seconds}
    dispatcher.close()
    row |= {"ideal": rounds * ROLLOUT_S, "coordinator_cpu_s": used.user + used.system - cpu.user - cpu.system}
    return row | job.counts


def bytes_per_rollout(host: Any, calls: int = 1000) -> dict[str, float]:
    """What one rollout costs on the wire: counted on the loopback device, less what Ray sends when idle."""
    request = ray.put(REQUEST)
    ray.get(host.run.remote(request, range(PAIRS), 0.0, False))

    def count(calls: int) -> tuple[int, float]:
        before, began = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.monotonic()
        for _ in range(calls // 50):
            ray.get([host.run.remote(request, range(PAIRS), 0.0, False) for _ in range(50)])
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
        str(k): ray.remote(RolloutActor).options(num_cpus=0).remote(config, str(ROOT), generator_checksum())
        for k in range(2)
    }
    ray.get([actor.ready.remote() for actor in actors.values()])
    parameters = 576  # of the recipe's adapter
    request = RolloutRequest(0, config.plan_shape.draw(0), torch.zeros(parameters), Directions(parameters, 0.01))
    rows = []
    for turn in range(3):
        for count in (1, 2):
            mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
            ray.get(mailbox.set_crew.remote([ray.put(dict(list(actors.items())[:count]))]))
            pool = RolloutPool(mailbox, Patience(hedge_after=None), 0)
            chunks = [range(20 * k, 20 * k + 20) for k in range(4 * count)]
            list(pool(request, chunks[:count]).results)  # the crew is known, kernels are warm
            began = time.monotonic()
            list(pool(request, chunks).results)
            pool.close()
            rows.append({"turn": turn, "actors": count, "seconds": time.monotonic() - began, "pairs": 80 * count})
    return rows


@contextmanager
def own_ray() -> Iterator[None]:
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[8, 64, 256, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    facts: dict[str, Any] = {"rollout_s": ROLLOUT_S, "ray": ray.__version__, "rows": []}
    with own_ray():
        hosts = [ray.remote(Host).options(num_cpus=0.1, max_concurrency=1000).remote() for _ in range(HOSTS)]
        ray.get([host.run.remote(ray.put(REQUEST), range(PAIRS), 0.0, False) for host in hosts])  # all is imported
        facts["bytes"] = bytes_per_rollout(hosts[0])
        print(facts["bytes"], flush=True)
        for actors in options.actors:
            facts["rows"] += [simulate(hosts, actors, 1, spread=False, hedge=False)]
            print(facts["rows"][-1], flush=True)
        for hedge in (False, True):
            facts["rows"] += [simulate(hosts, max(options.actors), 2, spread=True, hedge=hedge)]
            print(facts["rows"][-1], flush=True)
        facts["weak_scaling"] = weak_scaling(options.out.parent)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    one, two = (
        statistics.median(row["seconds"] for row in facts["weak_scaling"] if row["actors"] == count) for count in (1, 2)
    )
    print(f"real actors, the same work each: 1 takes {one:.2f} s, 2 take {two:.2f} s: efficiency {one / two:.2f}")


if __name__ == "__main__":
    main()
