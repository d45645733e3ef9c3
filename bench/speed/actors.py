"""What rollout actors do of an update, by preset; and what 0, 1 and 2 of them make of an update's time, on Ray.

    python -m bench.speed.actors        # about 10 minutes on two idle cores; writes bench/results/actors.json

Share: of an update's denoiser forwards and backwards, one of which counts as two forwards, on the demo's job with the
preset's plan. Before actors sampled chains they had the perturbation pairs alone. An update of a plan that a surrogate
may change is that before it is trusted.

Time: this process takes real updates (`update`), with real actors on a Ray of its own; no actor, one and two in turn.
Seconds follow what else the machine does, so what counts are ratios within a turn, and the CPU seconds of this process,
which are what is left to it. It helps while it waits, as a worker does.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from bench.common import RESULTS, ROOT, options, write_json
from bench.speed.measuring import rounded
from rlr_ray.cluster.coordinator import RunCoordinator
from rlr_ray.cluster.jobs import Patience
from rlr_ray.cluster.rollouts import RolloutActor, RolloutPool
from rlr_ray.config.estimator import EstimatorConfig
from rlr_ray.config.recipe import load_config
from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import generator_checksum
from rlr_ray.train.engine import Engine
from rlr_ray.train.online import online_surrogate
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update

PRESETS = ("awm", "black-box", "ddpo", "branches", "rlr", "rlr-paper", "es", "alignprop", "russian-roulette", "full_bp")
TIMED = ("awm", "ddpo", "branches", "rlr")
COUNTS = (0, 1, 2)
CHAINS, CHUNK = 40, 5


def config_of(preset: str, folder: Path) -> RunConfig:
    """The demo's job with a preset's plan and 40 chains an update, in 8 chunks."""
    keys = [f"output_dir={folder}", "device=cpu", f"train.chains={CHAINS}", f"train.chunk_size={CHUNK}"]
    base = load_config(str(ROOT / "configs" / "digits.yaml"), keys)
    blind = {"rewards": {"digits": {"name": "digits", "differentiable": False}}} if preset == "black-box" else {}
    estimator = EstimatorConfig.model_validate({"preset": preset})
    return RunConfig.model_validate(base.model_dump() | blind | {"estimator": estimator.model_dump()})


def shares(engine: Engine, config: RunConfig) -> dict[str, float]:
    """Of an update's work: what pairs are, and with the chains that need no gradient, which actors may all take."""
    one = engine.under(config)
    plans = one.plans(0)
    forwards, backwards = config.cost(plans, checkpoint_steps=False)
    pairs = config.estimator.zeroth_order.count * plans[0].pair_forwards
    free = sum(CHUNK * plan.free_forwards for plan in plans)
    work = forwards + 2 * backwards
    return {"before": rounded(pairs / work), "after": rounded((pairs + free) / work)}


class Bench:
    """A trainer's engine here, and two actors."""

    def __init__(self, config: RunConfig):
        self.engine = Engine(config)
        actor = ray.remote(RolloutActor).options(num_cpus=0)
        self.actors = {str(k): actor.remote(config, str(ROOT), generator_checksum(), {}) for k in range(max(COUNTS))}
        ray.get([one.ready.remote() for one in self.actors.values()])
        self.state = TrainState(self.engine.model.initial_theta, config.train, config.estimator, config.guards)
        self.state.rate = self.state.rate or 1e-3
        self.online = online_surrogate(self.engine)

    @contextlib.contextmanager
    def pool(self, count: int) -> Iterator[RolloutPool | None]:
        if not count:
            yield None
            return
        coordinator = ray.remote(RunCoordinator).options(num_cpus=0).remote()
        ray.get(coordinator.set_actors.remote([ray.put(dict(list(self.actors.items())[:count]))]))
        pool = RolloutPool(coordinator, Patience(hedge_after=None), 0)
        pool.share(1, self.engine.run)
        try:
            yield pool
        finally:
            pool.close()
            ray.kill(coordinator)

    def updates(self, count: int, updates: int) -> dict[str, float]:
        """So many updates with so many actors, after one that finds them: of one, seconds, CPU seconds and share."""
        with self.pool(count) as pool:
            update(self.engine, self.state, pool, ALONE, self.online)
            process, began = psutil.Process(), time.monotonic()
            before = process.cpu_times().user + process.cpu_times().system
            rows = [update(self.engine, self.state, pool, ALONE, self.online) for _ in range(updates)]
            taken, after = time.monotonic() - began, process.cpu_times().user + process.cpu_times().system
        share = statistics.mean(row.get("actor_share", 0.0) for row in rows)
        values = {"seconds": taken / updates, "trainer_cpu_s": (after - before) / updates, "share": share}
        return {"actors": count} | {name: rounded(value) for name, value in values.items()}

    def end(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="of each number of actors in a turn")
    parser.add_argument("--out", type=Path, default=RESULTS / "actors.json")
    args = parser.parse_args()
    configs = {preset: config_of(preset, args.out.parent) for preset in PRESETS}
    engine = Engine(configs["awm"])
    facts: dict[str, Any] = {"shares": {preset: shares(engine, config) for preset, config in configs.items()}}
    facts |= {
        "ray": ray.__version__,
        "chains": CHAINS,
        "chunk": CHUNK,
        "steps": configs["awm"].sampler.steps,
        "rows": [],
    }
    print(facts["shares"], flush=True)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    for preset in TIMED:
        bench = Bench(configs[preset])
        for turn in range(args.turns):
            for count in COUNTS:
                row = {"preset": preset, "turn": turn} | bench.updates(count, args.updates)
                facts["rows"] += [row]
                print(row, flush=True)
        bench.end()
    ray.shutdown()
    write_json(args.out, facts)


if __name__ == "__main__":
    main()
