"""An update: rollouts are started, chunks backpropagated meanwhile, terms summed, and the optimizer steps once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.adaptive import Proposal
from rlr_ray.core.chunk import Begun
from rlr_ray.core.gradient import GradientEstimate, estimate_gradient
from rlr_ray.core.kl import prediction_change
from rlr_ray.core.sampler import Chains
from rlr_ray.core.seeds import normal, permutation
from rlr_ray.rewards.mixture import Tally, WeightedSum
from rlr_ray.train.agreement import DriftMeter
from rlr_ray.train.chain_log import ChainLog
from rlr_ray.train.engine import Engine, RolloutBatch, RolloutRequest, Rollouts
from rlr_ray.train.online import features_read, show_surrogate
from rlr_ray.train.process import Process
from rlr_ray.train.sampling import ChainSource, Work, penalty_of, received, request_ahead, request_chains
from rlr_ray.train.state import Sampling, TrainState
from rlr_ray.train.surrogate import OnlineSurrogate


@dataclass(frozen=True)
class _Started:
    """Work of an update that is under way, here and on actors."""

    proposal: Proposal
    source: ChainSource
    meter: DriftMeter
    request: RolloutRequest  # of perturbation pairs
    pairs: RolloutBatch | None  # their results, in the leading process
    count: int  # of pairs
    chains: Mapping[int, Chains]  # by chunk, of this process
    tally: Tally


def update(
    engine: Engine,
    state: TrainState,
    rollouts: Rollouts | None,
    process: Process,
    online: OnlineSurrogate | None = None,
    total: WeightedSum | None = None,  # what is maximised; None: no reward standardised
    log: ChainLog | None = None,  # of chains
) -> dict[str, Any]:
    """Start all that needs no gradient, backpropagate this process's chunks, sum, and take one optimizer step."""
    began, step, total = time.monotonic(), state.step, total or engine.rewards.weighted_sum()
    started = _start(engine, state, rollouts, process, online, total)
    source, chains, count = started.source, started.chains, started.count
    prompts = [prompt.text for prompt in engine.train_prompts(step, range(engine.config.train.chains))]
    estimate = _estimate(engine, state, process, started, total, prompts)
    if log is not None:
        log.add(step, estimate, total)
    plan = source.request.plans[0]
    weights = state.adaptive.observe(plan, estimate)
    state.adaptive.observe_rewards(prompts, estimate.parts)
    mean, deviation = float(estimate.rewards.mean()), float(estimate.rewards.std())
    row: dict[str, Any] = {"step": step, "reward_mean": mean, "reward_std": deviation, "plan": str(plan)}
    row |= _terms(estimate, weights) | {"learning_rate": state.learning_rate}
    row |= _step(engine, state, process, chains, estimate, weights)
    row |= {"chains_behind": int(source.behind)} if engine.config.train.ahead else {}
    row |= started.meter.columns
    row["stepped_back"] = int(state.watch(estimate.rewards))
    coefficient = started.proposal.control_variate
    row |= show_surrogate(engine, state, step, coefficient, chains, estimate, process, online)
    row |= _rewards(engine, estimate, process, total, started.tally)
    row |= _forwards(engine, process, source, started.pairs, count)
    row["seconds"] = time.monotonic() - began
    return row | {"rollouts_per_s": 2 * (count - row.get("rollouts_missing", 0)) / row["seconds"]}


def _start(
    engine: Engine,
    state: TrainState,
    rollouts: Rollouts | None,
    process: Process,
    online: OnlineSurrogate | None,
    total: WeightedSum,
) -> _Started:
    """Chains and perturbation pairs are asked for at theta as it is, and the next update's chains if they may be."""
    config, proposal, tally = engine.config, state.propose(engine.config.sampler.steps), Tally()
    theta, coefficient = state.theta.detach().cpu().clone(), proposal.control_variate
    now = Sampling(theta, proposal.position_weights, coefficient, online.trusted if online else ())
    source = request_chains(engine, state, now, process, rollouts, total)
    plan, meter = source.request.plans[0], DriftMeter(engine, source)
    count = config.estimator.zeroth_order.count if plan.zeroth_order else 0
    request = RolloutRequest(state.step, plan, theta, proposal.directions, coefficient, total)
    pairs = _pairs(engine, request, rollouts) if count and process.leads else None
    request_ahead(engine, state, now, source.chunks, rollouts, total)
    chains = {c: _with_surrogate(engine, source.request.chains(engine, c, tally), online) for c in source.chunks}
    return _Started(proposal, source, meter, request, pairs, count, chains, tally)


def _estimate(
    engine: Engine, state: TrainState, process: Process, started: _Started, total: WeightedSum, prompts: Sequence[str]
) -> GradientEstimate:
    """The terms of the gradient at theta, each chain beside the running baseline of its prompt."""
    config, source, pairs, tally = engine.config, started.source, started.pairs, started.tally
    theta = state.theta.detach()
    work = {c: source.request.ready(c, chunk) for c, chunk in started.chains.items()}
    baseline = state.adaptive.baseline(prompts, len(total.labels))
    return estimate_gradient(
        engine.sampler,
        theta,
        work,
        engine.groups(),
        lambda: engine.zeroth_order(started.request, pairs.results, tally) if pairs else None,
        forms=replace(
            engine.forms(state.theta_to_save, state.adaptive.typical),
            behind=source.behind or source.otherwise,
            standardised=total.weights if config.estimator.half_order.baseline == "group" else None,
        ),
        baseline=None if baseline is None else baseline.to(theta),
        checkpoint_steps=engine.checkpoint_steps,
        begun=started.meter.watching(_begun(engine, source, work, tally)),
        penalty=penalty_of(engine, state.step),
        half_order_rows=started.proposal.half_order_rows if started.count else 0,
        reduce=process.reduce,
    )


def _step(
    engine: Engine,
    state: TrainState,
    process: Process,
    chains: Mapping[int, Chains],
    estimate: GradientEstimate,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Take the optimizer's step, measured by what it does to predictions at a noisy copy of the chains' last latents.

    The leading process, whose first chunk is the update's, measures; all take its number.
    """
    columns: dict[str, float] = {}
    schedule, seed, step = engine.model.schedule, engine.config.seed, state.step

    def change(before: Tensor, after: Tensor) -> float:
        measured = 0.0
        if process.leads:
            first, count = min(chains), engine.config.train.looked_at
            last = estimate.latents[first][:count]
            k = permutation(engine.sampler.trained, seed, "change", step)[0]
            noise = normal(tuple(last.shape), last.dtype, seed, "change", "noise", step).to(last)
            latents = schedule.signal[k] * last + schedule.noise[k] * noise
            conditioning = {name: value[:count] for name, value in chains[first].conditioning.items()}
            measured = prediction_change(engine.sampler, before, after, k, latents, conditioning)
        columns["prediction_change"] = float(
            process.reduce(torch.tensor(measured, dtype=torch.float64, device=engine.device))
        )
        return columns["prediction_change"]

    measure = None if engine.config.train.max_change is None else change
    columns["gradient_norm"] = state.update(estimate, weights, measure)
    return columns


def _chunks(count: int, size: int) -> list[range]:
    return [range(first, first + size) for first in range(0, count, size)]


def _begun(engine: Engine, source: ChainSource, work: Work, tally: Tally) -> Iterator[tuple[int, Begun]]:
    """This process's chunks as they come, each sampled up to its first-order steps."""
    if source.batch is None:
        return source.request.begin(engine, work)
    return received(source.batch.results, work, engine.config.train.chunk_size, tally)


def _pairs(engine: Engine, request: RolloutRequest, rollouts: Rollouts | None) -> RolloutBatch:
    zeroth = engine.config.estimator.zeroth_order
    return (rollouts or engine.local_rollouts)(request, _chunks(zeroth.count, zeroth.chunk_size))


def _forwards(
    engine: Engine, process: Process, source: ChainSource, pairs: RolloutBatch | None, count: int
) -> dict[str, Any]:
    """Denoiser forwards and backwards of all processes, and how many of them actors ran; `count` pairs were asked."""
    config, plans = engine.config, source.request.plans
    climbed = bool(source.request.trusted) or source.request.control_variate != 0
    cost = config.cost(plans, checkpoint_steps=engine.checkpoint_steps)
    forwards, backwards = map(sum, zip(cost, features_read(config, climbed=climbed), strict=True))
    row: dict[str, Any] = {"denoiser_forwards": forwards, "denoiser_backwards": backwards}
    chains = config.train.chunk_size * len(source.chunks)
    free = sum(plans[c].free_forwards for c in source.chunks) / len(source.chunks)  # of a chain, without a gradient
    row |= _by_actors(engine, process, [(pairs, count, plans[0].pair_forwards), (source.batch, chains, free)])
    if "actor_forwards" in row:
        row["actor_share"] = row["actor_forwards"] / (forwards + 2 * backwards)
    return row


_SUMMED = ("rollouts_missing", "rollouts_rerun", "rollouts_hedged", "rollouts_here")


def _by_actors(
    engine: Engine, process: Process, parts: Sequence[tuple[RolloutBatch | None, int, float]]
) -> dict[str, Any]:
    """Columns of what actors did, over all processes; of each part its batch, its indices and an index's forwards."""
    if engine.config.cluster == "none":
        return {}
    counts, forwards = [batch.counts if batch else {} for batch, *_ in parts], 0.0
    for count, (_, indices, forwards_each) in zip(counts, parts, strict=True):
        by_actors = indices - count.get("rollouts_missing", 0) - count.get("rollouts_here", 0) if count else 0
        forwards += by_actors * forwards_each
    sums = [*(float(sum(count.get(name, 0) for count in counts)) for name in _SUMMED), forwards]
    reduced = process.reduce(torch.tensor(sums, dtype=torch.float64, device=engine.device)).tolist()
    columns: dict[str, Any] = dict(zip((*_SUMMED, "actor_forwards"), map(round, reduced), strict=True))
    return columns | {"rollout_actors": max(count.get("rollout_actors", 0) for count in counts)}


def _with_surrogate(engine: Engine, chains: Chains, online: OnlineSurrogate | None) -> Chains:
    """These chains with an online surrogate's heads to switch to, or with its sum, not yet times its coefficient."""
    if online is None:
        return chains
    if engine.shape.switch:
        return replace(chains, heads=online.heads(chains.conditioning))
    return replace(chains, surrogate=online.objective(chains.conditioning))


def _rewards(
    engine: Engine, estimate: GradientEstimate, process: Process, total: WeightedSum, tally: Tally
) -> dict[str, Any]:
    """Time spent in rewards, each of several as it is, and scores that were replaced."""
    columns = {"reward_s": tally.seconds}
    if len(total.labels) > 1:
        means = total.scores(estimate.parts).mean(1).tolist()
        columns |= {f"reward_{label}_mean": mean for label, mean in zip(total.labels, means, strict=True)}
    if engine.rewards.replaces:
        columns["reward_invalid"] = int(process.reduce(torch.tensor(float(tally.invalid), device=engine.device)))
    return columns


def _terms(estimate: GradientEstimate, weights: Mapping[str, float]) -> dict[str, float]:
    """The terms' norms, variances and cosines, all before weighting, their weights and shares of noise."""
    columns = {} if estimate.divergence is None else {"kl_of_chains": estimate.divergence}
    for name, term in estimate.terms.items():
        columns[f"{name}_norm"] = float(term.gradient.norm())
        columns[f"{name}_variance"] = term.variance
        columns[f"{name}_weight"] = weights[name]
        if term.cut is not None:
            columns |= {f"{name}_clipped": term.cut.share, f"{name}_cut": term.cut.length}
    columns |= {f"{name}_noise_share": share for name, share in estimate.noise_shares(weights).items()}
    for one, other in combinations(estimate.terms, 2):
        product = float(estimate.terms[one].gradient @ estimate.terms[other].gradient)
        norms = columns[f"{one}_norm"] * columns[f"{other}_norm"]
        columns[f"cosine_{one}_{other}"] = product / norms if norms else 0.0
    return columns
