"""Where zeroth-order directions should lie, and what more of them buy: measured along the demo's run.

    python -m bench.runs.directions                       # resumable: a measured update is not measured again

The embedded model trains as in `configs/digits.yaml`, in this process. At some updates, on chains that the run does not
use: the exact gradient of every step, how much of g_C (its part at zeroth order's steps) each span holds, and 1,280
perturbation pairs in three spans, really run. Squared norms of means are unbiased (pairs of different chunks). Results:
bench/results/directions.json, where `gate` (what the weights took the signals for) is an earlier version's.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bench.common import RESULTS, ROOT, options, read_json, write_json
from rlr_ray.config.recipe import load_config
from rlr_ray.core.first_order import first_order, step_gradients
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Trajectory
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, principal_span
from rlr_ray.train.engine import Engine, RolloutRequest
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from rlr_ray.utils.environment import prepare_process

FILE = RESULTS / "directions.json"
MEASURED = (5, 10, 20, 30)  # updates
CHAINS, CHUNK, PAIRS = 1280, 40, 1280
ROLLED_OUT = ("the four guides", "8 components of half order", "32 components of half order")


def half_order_rows(engine: Engine, theta: Tensor, step: int) -> list[Tensor]:  # each [P]
    """The half-order gradients of an update's chunks."""
    plan, size = engine.plans(step)[0], engine.config.train.chunk_size
    rewards, wholes = [], []
    for first in range(0, engine.config.train.chains, size):
        chains = engine.train_chains(step, range(first, first + size))
        begun = engine.sampler.sample(theta, *chains.start, stop=plan.first_order.start)
        _, reward, whole = first_order(engine.sampler, theta, begun, chains.objective)
        rewards.append(reward)
        wholes.append(whole)
    advantages = leave_one_out(torch.cat(rewards), engine.groups()).split(size)
    pairs = zip(wholes, advantages, strict=True)
    return [half_order(engine.sampler, theta, whole, plan.sub_chains[0], advantage) for whole, advantage in pairs]


def squared_norm(rows: Tensor, others: Tensor | None = None) -> float:
    """Unbiased |mean|^2 (or inner product of two means) from independent rows [n, P]."""
    others = rows if others is None else others
    n = len(rows)
    return float((rows.sum(0) @ others.sum(0) - (rows * others).sum()) / (n * (n - 1)))


def exact_rows(engine: Engine, theta: Tensor, step: int, count: int) -> Tensor:  # [T, chunks, P]
    """Each step's gradient, a mean over each chunk of `count` chains that no update uses."""
    rows = []
    for first in range(0, count, CHUNK):
        chains = engine.train_chains(10_000 + step, range(first, first + CHUNK))
        start = Trajectory(chains.x_start[None], chains.noise, chains.conditioning)
        rows.append(step_gradients(engine.sampler, theta, start, chains.objective)[0])
    return torch.stack(rows, 1).double()


def spans(state: TrainState, half: list[Tensor]) -> dict[str, Tensor | None]:
    """Candidates by name, all from earlier updates; None: all of R^P. `half`: half-order gradients, newest last."""
    moment, way = state.optimizer.state[state.theta]["exp_avg"], state.theta.detach() - state.initial_theta
    guides = orthonormal_span([state.adaptive.guides["first_order"], moment, way, state.adaptive.guides["half_order"]])
    components = {f"{n} components of half order": principal_span(half[-4 * n :], n) for n in (4, 8, 16, 32)}
    return {"the four guides": guides, "isotropic": None} | components


def facts(rows: Tensor, plan: Plan, span: Tensor | None) -> dict[str, float]:
    """Of one span: its size, |P g_C|^2, the mean of |P g_C|^2 over single chains, and what the cosine needs."""
    part = rows[list(plan.zeroth_order)].sum(0)
    inside = part if span is None else part @ span.double().T
    lifted = part if span is None else inside @ span.double()
    signal = squared_norm(inside)
    return {
        "dimensions": inside.shape[1],
        "signal": signal,
        "second_moment": signal + CHUNK * float(inside.var(0).sum()),
        "with_all": squared_norm(lifted, rows.sum(0)),
        "with_first": squared_norm(lifted, rows[-3:].sum(0)),
        "with_half": squared_norm(lifted, rows[list(plan.sub_chains[0])].sum(0)),
    }


def rolled_out(engine: Engine, state: TrainState, step: int, span: Tensor | None, exact: Tensor) -> dict[str, float]:
    """Pairs really run: the squared distance of means of N from the projected g_C."""
    directions = Directions(len(state.theta), engine.config.estimator.zeroth_order.scale, span)
    request = RolloutRequest(20_000 + step, engine.plans(step)[0], state.theta.detach(), directions)
    results = [request.run(engine, range(i, i + 40)) for i in range(0, PAIRS, 40)]
    seeds = engine.direction_seeds(request.step, range(PAIRS))
    u = torch.stack([directions.coordinates(seed, torch.float32) for seed in seeds]).double()
    plus, minus = (
        torch.tensor([getattr(result, rewards) for result in results], dtype=torch.float64).flatten()
        for rewards in ("rewards_plus", "rewards_minus")
    )
    estimates = (plus - minus)[:, None] / (2 * directions.step_size) * u
    target = exact if span is None else exact @ span.double().T
    noise = float(target.var(0).sum()) / len(target)  # of the reference
    gaps = {n: estimates.view(-1, n, u.shape[1]).mean(1) - target.mean(0) for n in (80, 320, 1280)}
    return {f"error_{n}": float(gap.square().sum(1).mean()) - noise for n, gap in gaps.items()}


def measure(engine: Engine, state: TrainState, earlier: list[Tensor]) -> dict[str, Any]:
    """One update's figures."""
    step, theta = state.step, state.theta.detach()
    plan, rows = engine.plans(step)[0], exact_rows(engine, theta, step, CHAINS)
    candidates = spans(state, earlier)
    part, half = rows[list(plan.zeroth_order)].sum(0), rows[list(plan.sub_chains[0])].sum(0)
    first = rows[-3:].sum(0)
    return {
        "all": squared_norm(rows.sum(0)),
        "part": squared_norm(part),
        "first": squared_norm(first),
        "first_with_all": squared_norm(first, rows.sum(0)),
        "first_variance": CHUNK * float(first.var(0).sum()),
        "half": squared_norm(half),
        "half_with_all": squared_norm(half, rows.sum(0)),
        "half_with_first": squared_norm(half, first),
        "half_variance": CHUNK / 2 * float(torch.stack(earlier[-40:]).var(0).sum()),
        "spans": {name: facts(rows, plan, span) for name, span in candidates.items()},
        "rollouts": {name: rolled_out(engine, state, step, candidates[name], part) for name in ROLLED_OUT},
    }


def run(rate: float, seen: dict[str, Any]) -> None:
    """Train, measuring what was not yet, and keep `seen` on disk."""
    overrides = ["cluster=none", f"train.learning_rate={rate}"]
    prepare_process(1)
    engine = Engine(load_config(str(ROOT / "configs" / "digits.yaml"), overrides))
    state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
    measured, half = seen.setdefault(f"{rate:g}", {"measured": {}})["measured"], list[Tensor]()
    while state.step <= max(MEASURED):
        step, started = str(state.step), time.monotonic()
        if state.step in MEASURED and step not in measured:
            measured[step] = measure(engine, state, half)
            write_json(FILE, seen)
        half += half_order_rows(engine, state.theta.detach(), state.step)
        row = update(engine, state, None, Process())
        print(f"update {step}: reward {row['reward_mean']:.2f}, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    run(parser.parse_args().learning_rate, read_json(FILE.name) or {})


if __name__ == "__main__":
    main()
