"""An update's chains, asked for: at its own theta, or while the update before backpropagates (train.ahead)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rlr_ray.core.gradient import Penalty
from rlr_ray.core.kl import compared_steps
from rlr_ray.core.seeds import permutation
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.train.engine import Engine, RolloutBatch, Rollouts
from rlr_ray.train.process import Process
from rlr_ray.train.sampling import ChainRequest
from rlr_ray.train.state import Sampling, TrainState


@dataclass(frozen=True)
class Asked:
    """A process's chunks of an update, and where their chains come from."""

    request: ChainRequest
    own: Sequence[int]  # chunks
    batch: RolloutBatch | None  # on its way; None: this process samples
    behind: bool = False  # sampled at the theta of the update before


def ask(
    engine: Engine, state: TrainState, now: Sampling, process: Process, rollouts: Rollouts | None, total: WeightedSum
) -> Asked:
    """This update's chains: those sampled ahead, unless its plan has become another or theta stepped back meanwhile.

    A resumed run has them sampled again, at the same theta.
    """
    own, pending, state.pending = own_chunks(engine, process), state.pending, None
    request = chain_request(engine, state.step, now, total)
    if state.sampling is not None:
        earlier = chain_request(engine, state.step, state.sampling, total)
        if replace(earlier, theta=request.theta) == request:
            return Asked(earlier, own, pending or _on_their_way(engine, earlier, own, rollouts), behind=True)
    if pending is not None:
        pending.cancel()
    return Asked(request, own, _on_their_way(engine, request, own, rollouts))


def ask_ahead(
    engine: Engine, state: TrainState, now: Sampling, own: Sequence[int], rollouts: Rollouts | None, total: WeightedSum
) -> None:
    """Have the next update's chains sampled meanwhile, as it will ask for them if its plan stays what it is."""
    if not engine.config.train.ahead:
        return
    state.sampling = now
    if state.step + 1 < engine.config.train.iterations:
        state.pending = _on_their_way(engine, chain_request(engine, state.step + 1, now, total), own, rollouts)


def chain_request(engine: Engine, step: int, by: Sampling, total: WeightedSum) -> ChainRequest:
    """An update's chains, with the latents that its terms read."""
    surrogate, penalty = by.control_variate != 0, penalty_of(engine, step)
    plans = engine.plans(step, by.position_weights, surrogate=surrogate, trusted=by.trusted)
    kept = {*penalty.steps} if penalty else set[int]()
    if engine.config.train.ahead and plans[0].score == "path":
        kept |= {sub_chain.stop for plan in plans for sub_chain in plan.sub_chains}
    return ChainRequest(step, plans, by.theta, tuple(sorted(kept)), by.control_variate, by.trusted, total)


def own_chunks(engine: Engine, process: Process) -> list[int]:
    """This process's chunks of an update, in whole groups that are sampled together."""
    train = engine.config.train
    chunks = range(train.chains // train.chunk_size)
    return [c for c in chunks if c // train.sampled_together % process.size == process.rank]


def penalty_of(engine: Engine, step: int) -> Penalty | None:
    """What an update's chains pay for their divergence, at steps drawn evenly from all at which it is finite."""
    config, steps = engine.config, compared_steps(engine.sampler)
    if not config.compared_steps:
        return None
    drawn = permutation(len(steps), config.seed, "penalty", step)[: config.compared_steps]
    return Penalty(config.guards.kl_penalty, engine.model.initial_theta, [steps[i] for i in sorted(drawn)])


def _on_their_way(
    engine: Engine, asked: ChainRequest, own: Sequence[int], rollouts: Rollouts | None
) -> RolloutBatch | None:
    """These chunks sampled elsewhere; None if nobody there samples as this process does, or there is nothing to."""
    train = engine.config.train
    if rollouts is None or not engine.config.actors_sample or not any(asked.plans[c].sampled for c in own):
        return None
    groups = [list(chunks) for _, chunks in groupby(own, lambda c: c // train.sampled_together)]
    return rollouts(asked, [range(one[0] * train.chunk_size, (one[-1] + 1) * train.chunk_size) for one in groups])
