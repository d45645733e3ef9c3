"""An update's time against the longer of its two halves, which run side by side in two processes.

    python -m bench.speed.overlap --size digits       # or tiny_sd, tiny_sdxl; on a GPU also sd14, sdxl

This process takes real updates (`update`) and samples their chains; the pairs' rollouts run in another, which a pipe
joins to it, as actors do without Ray between. With two GPUs or more the other process has the second; with one they
share it, and the kernels of two processes take turns on it. Each turn measures, one after the other:

- each half alone: the update with rollouts that are there already, and the rollouts while this process waits;
- each half beside the other: what the machine gives to two processes at once;
- the update.

At true sizes 10 steps are taken, for both halves.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.models import DEVICE, TRUE_SIZES, recipe
from bench.speed.measuring import Kept, arguments, facts_of, rounded, seconds
from rlr_ray.config.run import RunConfig
from rlr_ray.core.zeroth_order import RolloutResult
from rlr_ray.train.engine import Engine, Request, RolloutBatch, RolloutRequest
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from rlr_ray.utils.environment import prepare_process

WALL = time.perf_counter  # two processes share what is timed


def serve(config: RunConfig, pipe: Connection) -> None:
    """Run the rollouts that are asked for, until nothing is."""
    prepare_process(config.threads)
    engine = Engine(config)
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        request, chunks = pickle.loads(asked)
        results: list[RolloutResult] = []
        taken = seconds(lambda: results.extend(engine.local_rollouts(request, chunks).results), WALL)  # noqa: B023
        pipe.send((taken, results))


class Other:
    """A process that runs rollouts; it has the second GPU if there is one."""

    def __init__(self, engine: Engine):
        self.engine, config = engine, engine.config
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(config, theirs), daemon=True)
        if torch.cuda.device_count() > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = "1"  # this process has opened its own already
        self.process.start()
        self.pipe.recv()
        self.asked: tuple[RolloutRequest, list[range]] | None = None  # last by an update

    def start(self, request: RolloutRequest, chunks: Sequence[range]) -> None:
        self.pipe.send(pickle.dumps((request, list(chunks))))

    def rollouts(self, request: Request, chunks: Sequence[range]) -> RolloutBatch:
        """`Rollouts` of the engine: pairs alone, chains are sampled by the process that asks."""
        if not isinstance(request, RolloutRequest):
            return self.engine.local_rollouts(request, chunks)
        self.asked = request, list(chunks)
        self.start(request, chunks)
        return RolloutBatch(self._results())

    def _results(self) -> Iterator[RolloutResult]:
        """Waits when the first is asked for."""
        yield from self.pipe.recv()[1]

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


class Bench:
    """An update in this process, its rollouts in another."""

    def __init__(self, size: str, **changes: Any):
        config = recipe(size, **({"sampler": {"steps": 10}} if size in TRUE_SIZES else {}), **changes)
        prepare_process(config.threads)
        self.engine = Engine(config)
        self.other = Other(self.engine)
        self.state = TrainState(self.engine.model.initial_theta, config.train, config.estimator)
        for _ in range(2):  # the second has guides
            self.step()

    def step(self) -> float:
        """Seconds of an update."""
        return seconds(lambda: update(self.engine, self.state, self.other.rollouts, Process()), WALL)

    def half(self, results: Sequence[RolloutResult]) -> float:
        """Seconds of an update whose rollouts are there already."""

        def rollouts(request: Request, chunks: Sequence[range]) -> RolloutBatch:
            pairs = isinstance(request, RolloutRequest)
            return RolloutBatch(results) if pairs else self.engine.local_rollouts(request, chunks)

        return seconds(lambda: update(self.engine, self.state, rollouts, Process()), WALL)

    def turn(self) -> dict[str, float]:
        step = self.step()
        assert self.other.asked is not None
        request, chunks = self.other.asked
        self.other.start(request, chunks)
        rollouts, results = self.other.pipe.recv()
        half = self.half(results)
        again = max(1, math.ceil(2 * half / rollouts))  # so often that two of this process's halves fit beside them
        self.other.start(request, chunks * again)
        beside = []
        while not self.other.pipe.poll():
            beside.append(self.half(results))
        rollouts_beside = self.other.pipe.recv()[0] / again
        half_beside = min(beside[:-1] or beside)  # the last may have been alone at its end
        row = {"step": step, "half": half, "rollouts": rollouts}
        row |= {"half_beside": half_beside, "rollouts_beside": rollouts_beside}
        return {name: rounded(value) for name, value in row.items()}

    def turns(self, count: int, budget_s: float = 60) -> dict[str, list[float]]:
        """Each column of so many turns; of fewer if they take longer than the budget, at least two."""
        began, rows = time.monotonic(), [self.turn()]
        while len(rows) < count and (len(rows) < 2 or time.monotonic() - began < budget_s):
            rows.append(self.turn())
        return {name: [row[name] for row in rows] for name in rows[0]}


def longer_halves(turns: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each turn's longer half, alone and beside the other."""
    alone, beside = (turns["half"], turns["rollouts"]), (turns["half_beside"], turns["rollouts_beside"])
    return {"alone": list(map(max, *alone)), "beside": list(map(max, *beside))}


def main() -> None:
    args = arguments(__doc__, turns=5)
    bench = Bench(args.size)
    where = "two CPU processes of one thread each"
    if DEVICE.type == "cuda":
        where = "two GPUs" if torch.cuda.device_count() > 1 else "two processes on one GPU"
    train, zeroth = bench.engine.config.train, bench.engine.config.estimator.zeroth_order
    facts = facts_of(bench.engine) | {"where": where, "chains": train.chains, "pairs": zeroth.count}
    kept = Kept("overlap", args.size, facts, args.limit_s)
    kept.row("turns", lambda: bench.turns(args.turns))
    bench.other.end()


if __name__ == "__main__":
    main()
