"""One update: rollouts started, chunks backpropagated meanwhile, terms summed, one optimizer step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.gradient import GradientEstimate, Penalty, estimate_gradient
from rlr_ray.core.kl import compared_steps, prediction_change
from rlr_ray.core.sampler import Chains
from rlr_ray.core.seeds import normal, permutation
from rlr_ray.rewards.mixture import Tally, WeightedSum
from rlr_ray.train.engine import Engine, RolloutRequest, Rollouts
from rlr_ray.train.online import features_read, show_surrogate
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.surrogate import OnlineSurrogate


def update(
    engine: Engine,
    state: TrainState,
    rollouts: Rollouts | None,
    process: Process,
    online: OnlineSurrogate | None = None,
    total: WeightedSum | None = None,  # what is maximised; None: no reward standardised
) -> dict[str, Any]:
    """One update: start the rollouts, backpropagate this process's chunks meanwhile, sum, take one optimizer step."""
    started = time.monotonic()
    config, step, theta = engine.config, state.step, state.theta.detach()
    proposal, total, tally = state.propose(config.sampler.steps), total or engine.rewards.weighted_sum(), Tally()
    coefficient = proposal.control_variate
    trusted = online.trusted if online else ()
    plans = engine.plans(step, proposal.position_weights, surrogate=coefficient != 0, trusted=trusted)
    zeroth = config.estimator.zeroth_order
    count, batch = zeroth.count if plans[0].zeroth_order else 0, None
    if rollouts and count and process.leads:
        request = RolloutRequest(step, plans[0], theta.cpu().clone(), proposal.directions, coefficient, total)
        batch = rollouts(request, _chunks(count, zeroth.chunk_size))
    chains = _own_chains(engine, step, process, online, total, tally)
    prompts = [prompt.text for prompt in engine.train_prompts(step, range(config.train.chains))]
    baseline = state.adaptive.baseline(prompts, len(total.labels))
    estimate = estimate_gradient(
        engine.sampler,
        theta,
        {c: (plans[c], one.with_control_variate(coefficient).trusting(trusted)) for c, one in chains.items()},
        engine.groups(),
        lambda: engine.zeroth_order(request, batch.results, tally) if batch else None,
        forms=engine.forms(state.theta_to_save, state.adaptive.typical),
        baseline=None if baseline is None else baseline.to(theta),
        checkpoint_steps=engine.checkpoint_steps,
        sampled_together=config.train.sampled_together,
        penalty=_penalty(engine, step),
        half_order_rows=proposal.half_order_rows if count else 0,
        reduce=process.reduce,
    )
    weights = state.adaptive.observe(plans[0], estimate)
    state.adaptive.observe_rewards(prompts, estimate.parts)
    mean, deviation = float(estimate.rewards.mean()), float(estimate.rewards.std())
    row: dict[str, Any] = {"step": step, "reward_mean": mean, "reward_std": deviation, "plan": str(plans[0])}
    row |= _terms(estimate, weights) | {"learning_rate": state.learning_rate}
    row |= _step(engine, state, process, chains, estimate, weights)
    row["stepped_back"] = int(state.watch(estimate.rewards))
    if config.estimator.surrogate is not None:
        row |= {"surrogate_coefficient": coefficient} if not engine.shape.switch else {}
        row |= show_surrogate(engine, state, step, chains, estimate, process, online)
    row |= _rewards(engine, estimate, process, total, tally)
    read = features_read(config, climbed=bool(trusted) or coefficient != 0)
    cost = config.cost(plans, checkpoint_steps=engine.checkpoint_steps)
    row["denoiser_forwards"], row["denoiser_backwards"] = map(sum, zip(cost, read, strict=True))
    row |= batch.counts if batch else {}
    row["seconds"] = time.monotonic() - started
    return row | {"rollouts_per_s": 2 * (count - row.get("rollouts_missing", 0)) / row["seconds"]}


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


def _own_chains(
    engine: Engine, step: int, process: Process, online: OnlineSurrogate | None, total: WeightedSum, tally: Tally
) -> dict[int, Chains]:
    """This process's chunks of an update, with the surrogate at its full size."""
    train, chains = engine.config.train, {}
    for c, indices in enumerate(_chunks(train.chains, train.chunk_size)):
        if c // train.sampled_together % process.size == process.rank:
            one = engine.train_chains(step, indices, total, tally)
            chains[c] = one if online is None else _with_surrogate(engine, one, online)
    return chains


def _with_surrogate(engine: Engine, chains: Chains, online: OnlineSurrogate) -> Chains:
    """With heads to switch to, or one surrogate to share the reward with."""
    if engine.shape.switch:
        return replace(chains, heads=online.heads(chains.conditioning))
    return replace(chains, surrogate=online.objective(chains.conditioning))


def _penalty(engine: Engine, step: int) -> Penalty | None:
    """What this update's chains pay for their divergence, at steps drawn evenly from all at which it is finite."""
    config, steps = engine.config, compared_steps(engine.sampler)
    if not config.compared_steps:
        return None
    drawn = permutation(len(steps), config.seed, "penalty", step)[: config.compared_steps]
    return Penalty(config.guards.kl_penalty, engine.model.initial_theta, [steps[i] for i in sorted(drawn)])


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
