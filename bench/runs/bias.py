"""How far biased gradients agree with the whole chain's backpropagation, on digits and on a model stopped early.

    python -m bench.runs.bias                             # resumable: what is measured is not measured again
    python -m bench.runs.bias "early-stopped, start"      # these alone, anew

At the start, and after some updates through the forward term. All forms see the same chains, whose gradients are kept
apart, in batches of ten, an update's. References: full backpropagation, clipped at half the median norm of all chains
(as by a run's running median), whose noise is small, and unclipped. Cosines and lengths of expectations, standard
errors by leaving out a batch (rlr_ray/lab/agreement.py). Results: bench/results/bias.json. Five minutes on a core.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.common import RESULTS, options, read_json
from bench.problems.build import build_missing
from bench.problems.problem import problems
from rlr_ray.core.first_order import first_order, linear_adjoint
from rlr_ray.core.forward_term import Weighting, forward_draws, forward_steps, forward_term, output_weight
from rlr_ray.core.half_order import branch_advantages, half_order, leave_one_out
from rlr_ray.core.sampler import Chains, Sampler, Trajectory
from rlr_ray.core.schedule import Schedule
from rlr_ray.lab.agreement import agreement
from rlr_ray.lab.report import write_json
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from rlr_ray.utils.environment import prepare_process

FILE = RESULTS / "bias.json"
CHAINS, CHUNK, BATCH = 2400, 100, 10
BRANCHED = 800  # of the chains: a branch at every step is dear
UPDATES = 40
PLACES = {  # name -> problem, updates before
    "digits, start": ("digits", 0),
    "digits, trained": ("digits", UPDATES),
    "early-stopped, start": ("early-stopped", 0),
    "early-stopped, trained": ("early-stopped", UPDATES),
}
RANGES = {"alpha-bar .03 to .4": (0.03, 0.4), "all steps": (0.0, 1.0)}
WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "elbo", "velocity")
CLIP = 0.5  # of the reference, whose noise is to be small
CLIPS = (CLIP, 2.0)  # of an update by itself; 2: what `auto` has
_FIRST = 3_000_000  # chains of updates that no run comes to
Rows = dict[str, Tensor]  # each [B, P], a chain's own estimate, or [B]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("places", nargs="*", metavar="PLACE", help=f"of {', '.join(PLACES)}")
    names = parser.parse_args().places
    build_missing()
    results = read_json(FILE.name) or {}
    for name in names or [name for name in PLACES if name not in results]:
        started = time.process_time()
        results[name] = place(*PLACES[name])
        results[name]["cpu_seconds"] = time.process_time() - started
        write_json(FILE, results)
        print(name, results[name], flush=True)


def place(problem: str, updates: int) -> dict[str, Any]:
    engine, theta = standing(problem, updates)
    chunks = [rows_of(engine, theta, number) for number in range(CHAINS // CHUNK)]
    rows = {name: torch.cat([chunk[name] for chunk in chunks if name in chunk]) for name in chunks[0]}
    schedule = engine.sampler.schedule
    estimates = batches_of(rows, schedule, engine.sampler.trained)
    clipped, raw = (estimates.pop(name) for name in ("clipped", "full backpropagation"))
    noise = {name: noise_scale(each) for name, each in {"clipped": clipped, "raw": raw, **estimates}.items()}
    forms = {name: beside(each, clipped, raw) for name, each in estimates.items()}
    return {
        "chains": CHAINS,
        "branched": BRANCHED,
        "updates": updates,
        "reward": float(rows["reward"].mean()),
        "clipped beside raw": asdict(agreement(clipped, raw)),
        "forms": forms,
        "noise scale": noise,
    }


def beside(estimates: Tensor, clipped: Tensor, raw: Tensor) -> dict[str, Any]:  # each [n, P]
    n = len(estimates)  # of branches fewer
    return {"clipped": asdict(agreement(estimates, clipped[:n])), "raw": asdict(agreement(estimates, raw[:n]))}


def noise_scale(rows: Tensor) -> float:  # [n, P]
    """tr(covariance of a chain's gradient) / |its mean|^2, which is taken over pairs of batches."""
    rows = rows.double()
    square = float(rows.sum(0).square().sum() - rows.square().sum()) / (len(rows) * (len(rows) - 1))
    return BATCH * float(rows.var(0).sum()) / square


def standing(problem: str, updates: int) -> tuple[Engine, Tensor]:
    """An engine, and theta after so many updates of ten chains through the forward term."""
    form = {"score": "forward", "baseline": "batch", "weight": 1.0}
    keys = {"preset": "custom", "first_order": {"steps": 0}, "sub_chain": {"length": 0}, "rest": "none"}
    train = {"iterations": 240, "chains": BATCH, "chunk_size": BATCH, "chains_per_prompt": 1, "learning_rate": 0.03}
    overrides = [f"estimator={keys | {'half_order': form}}", f"train={train}"]
    config = problems()[problem].config("gradient", overrides)
    prepare_process(config.threads)
    engine = Engine(config)
    state = TrainState(engine.model.initial_theta, config.train, config.estimator)
    for _ in range(updates):
        update(engine, state, None, ALONE)
    return engine, state.theta.detach()


def rows_of(engine: Engine, theta: Tensor, number: int) -> Rows:
    """A chunk's chains, each with its own gradient in every form; forward terms by step, at advantage 1."""
    sampler, indices = engine.sampler, range(CHUNK)
    chains = engine.train_chains(_FIRST + number, indices)
    start = Trajectory(chains.x_start[None], chains.noise, chains.conditioning)
    full, rewards, whole = first_order(sampler, theta, start, chains.objective, per_chain=True)
    linear, _ = linear_adjoint(sampler, theta, whole, chains.objective, range(sampler.trained), per_chain=True)
    prompts = [prompt.text for prompt in engine.train_prompts(_FIRST + number, indices)]
    known = [prompt.text for prompt in engine.prompts]
    rows = {
        "full": full,
        "linear adjoint": linear,
        "forward": forward_by_step(sampler, theta, whole, number),
        "reward": rewards,
        "prompt": torch.tensor([known.index(prompt) for prompt in prompts]),
    }
    if number < BRANCHED // CHUNK:
        rows["branches"] = branched(sampler, theta, whole, rewards, chains)
    return rows


def forward_by_step(sampler: Sampler, theta: Tensor, whole: Trajectory, number: int) -> Tensor:  # [B, T, P]
    seeds = [("bias", number, index) for index in range(CHUNK)]
    every = range(sampler.trained)
    _, noise = forward_draws(every, len(every), whole.latents.shape[2:], seeds)
    each, ones, last = theta.expand(CHUNK, -1), torch.ones(CHUNK), whole.latents[-1]
    terms = [
        forward_term(sampler, each, last, whole.conditioning, ones, torch.full((CHUNK, 1), k), noise[k : k + 1])
        for k in every
    ]
    return CHUNK * torch.stack(terms, dim=1)  # a chain's own, not its part of the mean


def branched(sampler: Sampler, theta: Tensor, whole: Trajectory, rewards: Tensor, chains: Chains) -> Tensor:  # [B, P]
    steps = [k for k in range(sampler.trained) if sampler.schedule.sigma[k]]
    advantages = branch_advantages(sampler, theta, whole, rewards, chains.objective, steps)
    each = theta.expand(CHUNK, -1)
    terms = [half_order(sampler, each, whole, range(k, k + 1), a) for k, a in zip(steps, advantages, strict=True)]
    return CHUNK * torch.stack(terms).sum(0)


def batches_of(rows: Rows, schedule: Schedule, trained: int) -> Rows:  # each [n, P], a row a batch of ten
    """Every form's estimates, as updates of ten chains make them, the running baseline at its limit."""
    estimates = {"full backpropagation": rows["full"], "linear adjoint": rows["linear adjoint"]}
    estimates |= {"antithetic branches": rows["branches"]}
    number = torch.arange(len(rows["reward"])) // BATCH
    advantages = leave_one_out(leave_one_out(rows["reward"], rows["prompt"]), number)
    batch = leave_one_out(rows["reward"], number)
    for said, (low, high) in RANGES.items():
        steps = forward_steps(schedule, low, high, stop=trained)
        for weighting in WEIGHTINGS:
            if weighting == "elbo" and len(schedule) - 1 in steps and not schedule.end[1]:
                continue  # infinite at a last step that ends without noise
            each = weighted(rows["forward"], schedule, steps, weighting)
            estimates[f"forward term, {weighting}, {said}"] = advantages[:, None] * each
            if weighting == "uniform":
                estimates[f"forward term, {weighting}, {said}, no baseline of the prompt"] = batch[:, None] * each
                estimates[f"forward term, {weighting}, {said}, advantage 1"] = each
    means = {name: each.unflatten(0, (-1, BATCH)).mean(1) for name, each in estimates.items()}
    forms = {"clipped": rows["full"], "linear adjoint, clipped": rows["linear adjoint"]}
    means |= {name: clipped(each) for name, each in forms.items()}
    return means | {
        f"full backpropagation, clipped by tens at {c:g}": clipped(rows["full"], c, by_batch=True) for c in CLIPS
    }


def weighted(forward: Tensor, schedule: Schedule, steps: tuple[int, ...], weighting: Weighting) -> Tensor:  # [B, P]
    factors = [output_weight(schedule, k, weighting) / output_weight(schedule, k, "uniform") for k in steps]
    return torch.einsum("bkp,k->bp", forward[:, list(steps)], torch.tensor(factors))


def clipped(rows: Tensor, clip: float = CLIP, *, by_batch: bool = False) -> Tensor:  # [B, P] -> [n, P]
    """Batches' means over chains, each cut to `clip` times the median norm of all, or of its batch, as by ClippedMean.

    The one is what a run's running median tends to, the other that of an update alone.
    """
    batches = rows.unflatten(0, (-1, BATCH))
    norms = batches.norm(dim=2, keepdim=True)
    limit = clip * (norms.median(dim=1, keepdim=True).values if by_batch else norms.median())
    return (batches * (limit / norms).clamp(max=1)).mean(1)


if __name__ == "__main__":
    main()
