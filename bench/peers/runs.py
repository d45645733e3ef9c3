"""TRL 0.12's AlignPropTrainer and DDPOTrainer beside this project's plans, on the embedded digits.

    python -m venv ENV && ENV/bin/pip install -r bench/peers/requirements.txt
    nice python -m bench.peers.runs --python ENV/bin/python          # resumable: a finished run is not run again
    nice python -m bench.peers.runs --python ENV/bin/python --long   # one seed, three times as long

TRL's trainers run in an environment of their own (trl_trainers.py) on the same pipeline, adapter and its initial
values, reward and prompts. What they leave at some points of a run is the adapter's numbers; those are judged here, on
the held-out chains of the ablation, whose runs of our plans they are compared with; one more plan runs here. Cost: rows
that pass the denoiser forwards, counted by hooks, a backward as two; guidance's passes count both. Every trainer gets
each learning rate once, on a seed of its own, at half the cost; the best one runs on the seeds of the table. Results:
bench/results/peers*.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import RESULTS, ROOT, options, read_rows, write_json
from bench.peers.folder import older_folder
from bench.runs.sweep import CHOICE_SEED, Job, best, load_sweep, run_missing
from rlr_ray.assets import DIGITS
from rlr_ray.config.recipe import load_config
from rlr_ray.train.engine import Engine
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import Process, update
from rlr_ray.utils.environment import prepare_process
from rlr_ray.utils.memory import peak_bytes

FILE, LONG, REFUSED = (RESULTS / name for name in ("peers.jsonl", "peers_long.jsonl", "peers_refused.json"))
COST = 72_000  # of a run, in denoiser forwards: half of the ablation's
POINTS = 6  # held-out evaluations in that time
SEEDS, LEARNING_RATES = (0, 1, 2), (0.01, 0.03)
CHECKED = 2  # chains of each run that both environments must draw alike
CHUNK = 100  # held-out chains at once
GUIDED = 1.0001  # as near to none as the trainers take: they stop at 1


@dataclass(frozen=True)
class Peer:
    """One of TRL's trainers, as shipped or repaired."""

    trainer: str
    options: dict[str, Any]
    repaired: bool = True
    chunk_size: int = 80  # chains at once; of random truncation those that share a depth
    optimizer_steps: int = 1  # an epoch of as many chains as our update has


def last(steps: int) -> dict[str, Any]:
    """Backpropagation through the last steps of 10 alone."""
    return {"truncated_backprop_rand": False, "truncated_backprop_timestep": 10 - steps}


FITTING = {"truncated_rand_backprop_minmax": (0, 9)}
DDPO_REPAIRED = {"train_cfg": False, "per_prompt_stat_tracking": True}
PEERS = {
    "AlignProp, all steps": Peer("AlignProp", last(10)),
    "AlignProp, last step": Peer("AlignProp", last(1)),
    "AlignProp, random truncation, repaired": Peer("AlignProp", FITTING, chunk_size=40),
    "DDPO, repaired": Peer("DDPO", DDPO_REPAIRED),
    "DDPO, as shipped": Peer("DDPO", {}, repaired=False, chunk_size=40, optimizer_steps=2),
    "AlignProp, random truncation, as shipped": Peer("AlignProp", FITTING, repaired=False, chunk_size=40),
}
# Plan of ours that the ablation has not -> overrides of configs/digits.yaml
OURS = {
    "ddpo without the last step": [
        "reward.differentiable=false",
        "estimator={preset: custom, first_order: {steps: 0}, rest: none}",
        "estimator.sub_chain={length: 1, count: 9, place: [0, 8]}",
        "estimator.half_order.weight=1.0",
    ],
}
ALL = [*PEERS, *OURS]
# Plan of the ablation, run longer here; its chains at once change nothing but the last bits.
LONGER = {"full backprop": [*load_sweep("ablation").variants["full backprop"], "train.chunk_size=80"]}
# What the trainers refuse as shipped: settings -> guidance scale and trainer.
REFUSALS = {
    "AlignProp, guidance 1": (1.0, Peer("AlignProp", last(1), repaired=False)),
    "DDPO, guidance 1": (1.0, Peer("DDPO", {}, repaired=False)),
    "AlignProp, truncated_backprop_rand=False, other settings as they are": (
        GUIDED,
        Peer("AlignProp", {"truncated_backprop_rand": False}, repaired=False),
    ),
    "AlignProp, all settings of the truncation as they are": (GUIDED, Peer("AlignProp", {}, repaired=False)),
}


class Trl:
    """A process in TRL's environment that makes one run after the other, and the folder through which it is asked."""

    def __init__(self, python: str, folder: Path):
        self.folder = folder
        self.pipeline = older_folder(DIGITS / "pipeline", folder / "pipeline")
        command, environment = [python, "-m", "bench.peers.trl_trainers"], os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, spec: dict[str, Any]) -> dict[str, Any]:
        asked, answered = self.folder / "spec.pt", self.folder / "found.pt"
        torch.save(spec | {"folder": str(self.pipeline)}, asked)
        assert self.process.stdin is not None and self.process.stdout is not None
        print(asked, answered, file=self.process.stdin, flush=True)
        if self.process.stdout.readline().strip() != "done":
            raise RuntimeError(f"TRL's environment ended with {self.process.wait()}; its errors are above")
        return torch.load(answered, weights_only=True)


@functools.lru_cache(maxsize=1)
def engine_of(seed: int, *overrides: str) -> Engine:
    """Whose held-out chains are those of the ablation's run with this seed."""
    keys = ["cluster=none", "evaluation.chains=200", f"seed={seed}", *overrides]
    prepare_process(1)
    return Engine(load_config(str(ROOT / "configs" / "digits.yaml"), keys))


def train_here(engine: Engine, points: list[int], *, traced: bool = False) -> dict[str, Any]:
    """A run of our own plan, told as trl_trainers.py tells of TRL's; traced: with one more update's peak memory."""
    state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
    online, results, cost, seconds = engine.online_surrogate(), [], 0, 0.0
    while points:
        begun = time.process_time()
        row = update(engine, state, engine.local_rollouts, Process(), online)
        seconds += time.process_time() - begun
        cost += row["denoiser_forwards"] + 2 * row["denoiser_backwards"]
        if cost >= points[0]:
            results.append(
                {"cost": cost, "updates": state.step, "seconds": seconds, "theta": state.theta_to_save.clone()}
            )
            points = [point for point in points if point > cost]
    if not traced:
        return {"points": results}
    peak = peak_bytes(lambda: update(engine, state, engine.local_rollouts, Process(), online), engine.device)
    return {"points": results, "peak_bytes": peak}


@torch.no_grad()
def held_out(engine: Engine, theta: Tensor) -> tuple[float, float]:
    """Mean reward of the held-out chains, and the share that the judge reads as the digit asked for."""
    rewards: list[Tensor] = []
    judged: list[Tensor] = []
    for first in range(0, engine.config.evaluation.chains, CHUNK):
        indices = range(first, first + CHUNK)
        _, images = engine.sample(theta, indices)
        texts = [prompt.text for prompt in engine.held_out(indices)[1]]
        for mixture, scores in ((engine.rewards, rewards), (engine.judges, judged)):
            scores.append(mixture.score(images, texts, [{}] * CHUNK).scores[0])
    return float(torch.cat(rewards).mean()), float(torch.cat(judged).mean())


def spec_of(peer: Peer, engine: Engine, rate: float, points: list[int], **more: Any) -> dict[str, Any]:
    config, model = engine.config, engine.model
    parameters = model.parameters  # type: ignore[attr-defined]
    seeds, prompts = engine.held_out(range(CHECKED))
    return {
        "trainer": peer.trainer,
        "repaired": peer.repaired,
        "options": peer.options,
        "chunk_size": peer.chunk_size,
        "optimizer_steps": peer.optimizer_steps,
        "guidance": 1.0 if peer.repaired else GUIDED,
        "learning_rate": rate,
        "seed": config.seed,
        "points": points,
        "adapter": config.adapter.options,
        "theta": model.initial_theta,
        "shapes": parameters.shapes,
        "prompts": [prompt.text for prompt in engine.prompts],
        "chains": config.train.chains,
        "steps": config.sampler.steps,
        "eta": config.sampler.eta,
        "checked": list(zip(seeds, [prompt.text for prompt in prompts], strict=True)),
        "traced": False,
    } | more


def difference(engine: Engine, results: dict[str, Any]) -> float:
    """The largest between pictures drawn there and here at a run's end, whose sides are [0, 1].

    Raises RuntimeError if it is more than arithmetic: then the two do not train the same model.
    """
    _, here = engine.sample(results["points"][-1]["theta"], range(CHECKED))
    largest = float((here - results["pictures"]).abs().max())
    if largest > 1e-2:
        raise RuntimeError(f"pictures of both environments differ by {largest:.3g}; at most 0.01 is expected")
    return largest


def make(job: Job, trl: Trl, cost: int) -> dict[str, Any]:
    name, rate, seed = job["variant"], job["learning_rate"], job["seed"]
    points = [COST // 2] if seed == CHOICE_SEED else list(range(COST // POINTS, cost + 1, COST // POINTS))
    if name in OURS | LONGER:
        engine, more = engine_of(seed, *(OURS | LONGER)[name], f"train.learning_rate={rate}"), {}
        results = train_here(engine, points)
    else:
        engine = engine_of(seed)
        results = trl.ask(spec_of(PEERS[name], engine, rate, points))
        if "error" in results:
            raise RuntimeError(f"{job}: {results['error']}")
        more = {"difference": difference(engine, results), "versions": results["versions"]}
    curve = judged(engine, results["points"])
    row = job | {"gain": curve[-1]["reward"] - curve[0]["reward"]}
    row |= {"judge_after": curve[-1]["judge"], "seconds": results["points"][-1]["seconds"], "curve": curve}
    return row | more


def judged(engine: Engine, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out reward and judge at the start and at the points of a run."""
    start = {"cost": 0, "updates": 0, "theta": engine.model.initial_theta}
    curve = []
    for point in (start, *points):
        reward, judge = held_out(engine, point["theta"])
        curve.append({"cost": point["cost"], "updates": point["updates"], "reward": reward, "judge": judge})
    return curve


def refusals(trl: Trl) -> dict[str, dict[str, Any]]:
    """What TRL's trainers say where they do not run as shipped, and after how many updates."""
    engine, told = engine_of(0), {}
    for name, (guidance, peer) in REFUSALS.items():
        results = trl.ask(spec_of(peer, engine, LEARNING_RATES[0], [COST // 3], guidance=guidance))
        told[name] = {"error": results.get("error", "none"), "updates": results["updates"]}
    return told


def job_of(name: str, rate: float, seed: int) -> Job:
    return {"variant": name, "learning_rate": rate, "seed": seed}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--python", required=True, help="of the environment of bench/peers/requirements.txt")
    parser.add_argument("--trainers", nargs="+", choices=[*ALL, *LONGER], default=ALL, help="these alone")
    parser.add_argument("--long", action="store_true", help="one seed, three times as long: does it collapse?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trl = Trl(args.python, Path(folder))

        def run_all(file: Path, jobs: list[Job], cost: int = COST) -> None:
            run_missing(file, jobs, lambda job: make(job, trl, cost))

        if not REFUSED.exists():
            write_json(REFUSED, refusals(trl))
        run_all(
            FILE, [job_of(name, rate, CHOICE_SEED) for name in args.trainers if name in ALL for rate in LEARNING_RATES]
        )
        swept = [*read_rows(FILE), *read_rows(load_sweep("ablation").file)]
        rates = {name: best(swept, name)["learning_rate"] for name in args.trainers}
        if args.long:
            run_all(LONG, [job_of(name, rates[name], SEEDS[0]) for name in args.trainers], 3 * COST)
        else:
            run_all(FILE, [job_of(name, rates[name], seed) for seed in SEEDS for name in args.trainers])


if __name__ == "__main__":
    main()
