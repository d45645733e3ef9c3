"""Seconds of an update with `train.ahead` 0 and 1, where chains are sampled on a simulated device of their own.

    python -m bench.speed.ahead      # minutes; writes bench/results/ahead_time.json

The digits' job of the forward term, in real updates of one process, without Ray. The actor is a thread with an engine
of its own: it samples a chunk and then sleeps, until the chunk has taken as long as the simulated device takes. All of
an update's together take that twice as long as the trainer's half alone, which is measured first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.common import RESULTS, ROOT, options, write_json
from bench.speed.measuring import machine, rounded
from rlr_ray.config.recipe import load_config
from rlr_ray.config.run import RunConfig
from rlr_ray.train.engine import Engine, Request, RolloutBatch
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update

CHAINS, CHUNK = 40, 20
JOB = [f"train.chains={CHAINS}", f"train.chunk_size={CHUNK}", "estimator={preset: awm}"]
JOB += ["cluster=none", "device=cpu", "output_dir=build/bench"]
TIMES = 2.0  # an update's sampling over the trainer's half
TURNS = 3


class SleepingActor:
    """`Rollouts` of one actor beside the trainer."""

    def __init__(self, config: RunConfig):
        self.engine, self.chunk_s = Engine(config), 0.0
        self.thread = ThreadPoolExecutor(1)
        self.late = 0  # chunks that took longer than they were to

    def __call__(self, request: Request, chunks: Sequence[range]) -> RolloutBatch:
        calls = [self.thread.submit(self._run, request, chunk) for chunk in chunks]
        return RolloutBatch(call.result() for call in calls)

    def _run(self, request: Request, chunk: range) -> Any:
        began = time.monotonic()
        result = self.engine.run(request, chunk)
        left = self.chunk_s - (time.monotonic() - began)
        self.late += left < 0
        time.sleep(max(left, 0.0))
        return result


def job(ahead: int) -> tuple[Engine, TrainState]:
    engine = Engine(load_config(str(ROOT / "configs" / "digits.yaml"), [*JOB, f"train.ahead={ahead}"]))
    return engine, TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)


def half_s(actor: SleepingActor) -> float:
    """Seconds of an update after its chains have come: the trainer's half."""
    engine, state = job(0)
    taken = []
    for _ in range(4):
        came: list[float] = []

        def rollouts(request: Request, chunks: Sequence[range], came: list[float] = came) -> RolloutBatch:
            results = [actor.engine.run(request, chunk) for chunk in chunks]
            came.append(time.monotonic())
            return RolloutBatch(results)

        update(engine, state, rollouts, ALONE)
        taken.append(time.monotonic() - came[-1])
    return statistics.median(taken[1:])


def seconds(actor: SleepingActor, ahead: int, updates: int) -> list[float]:
    """Of each update but the first, whose chains nobody could draw before."""
    engine, state = job(ahead)
    taken = [update(engine, state, actor, ALONE)["seconds"] for _ in range(updates)]
    return [rounded(one) for one in taken[1:]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--updates", type=int, default=8)
    args = parser.parse_args()
    actor = SleepingActor(job(0)[0].config)
    half = half_s(actor)
    actor.chunk_s = TIMES * half * CHUNK / CHAINS
    facts: dict[str, Any] = {"machine": machine(), "half_s": rounded(half), "sampling_s": rounded(TIMES * half)}
    facts["turns"] = []
    for _ in range(TURNS):
        facts["turns"].append({str(ahead): seconds(actor, ahead, args.updates) for ahead in (0, 1)})
        print(facts["turns"][-1], flush=True)
        write_json(RESULTS / "ahead_time.json", facts | {"late": actor.late})


if __name__ == "__main__":
    main()
