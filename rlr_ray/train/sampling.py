"""An update's chains as work for whoever runs forwards: requested by numbers, and returned as tensors by name.

They are requested at the update's own theta or, with train.ahead, while the update before backpropagates. B chains of a
chunk, T steps, m parts of the reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from rlr_ray.core.chunk import Begun, begin
from rlr_ray.core.gradient import Penalty
from rlr_ray.core.kl import compared_steps
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Trajectory
from rlr_ray.core.seeds import permutation
from rlr_ray.rewards.mixture import Tally, WeightedSum
from rlr_ray.train.engine import Engine, RolloutBatch, Rollouts
from rlr_ray.train.picture_engine import PictureEngine
from rlr_ray.train.process import Process
from rlr_ray.train.state import Sampling, TrainState
from rlr_ray.utils.memory import memory_errors

Work = Mapping[int, tuple[Plan, Chains]]  # chunk's number -> its plan and chains


@dataclass(frozen=True)
class Sampled:
    """The results of some chains as tensors by name; pickled they are their bytes and little else."""

    indices: range
    tensors: Mapping[str, Tensor]
    invalid: int = 0  # rewards that were not finite and replaced
    reward_s: float = 0.0  # spent in rewards, in the process that shares the update's clock

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.tensors.items()
        }
        return _unpacked, (self.indices, safetensors.torch.save(tensors), self.invalid)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins so, by the rest of it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def _unpacked(indices: range, tensors: bytes, invalid: int) -> Sampled:
    return Sampled(indices, safetensors.torch.load(tensors), invalid)


@dataclass(frozen=True)
class ChainRequest:
    """An update's chains up to first order's steps, by their numbers, and what is known of them without a gradient.

    Of each chunk come back its latents at the steps that terms read and, of whole chains, the parts of their reward and
    half order's branches. Indices are chains, in whole groups that are sampled together.
    """

    step: int  # the update
    plans: Sequence[Plan]  # of every chunk
    theta: Tensor  # [P]
    kept: tuple[int, ...] = ()  # steps whose latents are wanted beside those that plans read
    control_variate: float = 0.0  # the surrogate's coefficient
    trusted: tuple[int, ...] = ()  # heads of an online surrogate that first order carries
    total: WeightedSum | None = None  # what is maximised; None: no reward standardised
    partial: bool = False

    def name(self, indices: range) -> str:
        return f"chains {indices.start} to {indices.stop - 1} of update {self.step}"

    def chains(self, engine: Engine, chunk: int, tally: Tally) -> Chains:
        """A chunk's chains; what an online surrogate says of them is not among it."""
        size = engine.config.train.chunk_size
        return engine.train_chains(self.step, range(chunk * size, (chunk + 1) * size), self.total, tally)

    def ready(self, chunk: int, chains: Chains) -> tuple[Plan, Chains]:
        """The chunk's plan, and its chains as that has them."""
        return self.plans[chunk], chains.with_control_variate(self.control_variate).trusting(self.trusted)

    def begin(self, engine: Engine, work: Work) -> Iterator[tuple[int, Begun]]:
        together = engine.config.train.sampled_together
        return begin(engine.sampler, self.theta.to(engine.device), work, together, self.kept)

    @memory_errors()
    def run(self, engine: Engine, indices: range) -> Sampled:
        tally, size = Tally(), engine.config.train.chunk_size
        chunks = range(indices.start // size, indices.stop // size)
        work = {c: self.ready(c, self.chains(engine, c, tally)) for c in chunks}
        tensors = dict[str, Tensor]()
        for c, begun in self.begin(engine, work):
            parts = {"latents": begun.trajectory.latents, "parts": begun.parts, "branches": begun.branches}
            parts["steps"] = None if begun.trajectory.steps is None else torch.tensor(begun.trajectory.steps)
            parts["replaced"] = work[c][1].replaced[0] if begun.parts is not None else None
            tensors |= {f"{c}/{name}": value for name, value in parts.items() if value is not None}
        return Sampled(indices, tensors, tally.invalid, tally.seconds)


def received(results: Iterable[Sampled], work: Work, size: int, tally: Tally) -> Iterator[tuple[int, Begun]]:
    """Each chunk's number and its chains as they come back; `size` is a chunk's, `tally` counts their rewards."""
    for result in results:
        tally.invalid += result.invalid
        tally.seconds += result.reward_s
        for c in range(result.indices.start // size, result.indices.stop // size):
            chains = work[c][1]
            there = {name: value.to(chains.x_start.device) for name, value in result.of(f"{c}/").items()}
            steps = tuple(there["steps"].tolist()) if "steps" in there else None
            if "replaced" in there:
                chains.replaced.append(there["replaced"])
            trajectory = Trajectory(there["latents"], chains.noise, chains.conditioning, steps)
            yield c, Begun(trajectory, there.get("parts"), there.get("branches"))


@dataclass(frozen=True)
class ChainSource:
    """The chunks that this process backpropagates in an update, and where their chains come from."""

    request: ChainRequest
    chunks: Sequence[int]
    batch: RolloutBatch | None  # being sampled elsewhere; None: this process samples
    behind: bool = False  # sampled at the theta of the update before
    otherwise: bool = False  # sampled by actors that compute otherwise than this process


def request_chains(
    engine: Engine, state: TrainState, now: Sampling, process: Process, rollouts: Rollouts | None, total: WeightedSum
) -> ChainSource:
    """This update's chains: those sampled ahead, unless its plan has become another or theta stepped back meanwhile.

    A resumed run has them sampled again, at the same theta.
    """
    chunks, pending, state.pending = local_chunks(engine, process), state.pending, None
    request = chain_request(engine, state.step, now, total)
    if state.sampling is not None:
        earlier = chain_request(engine, state.step, state.sampling, total)
        if replace(earlier, theta=request.theta) == request:
            return _source(engine, earlier, chunks, pending or _start(engine, earlier, chunks, rollouts), behind=True)
    if pending is not None:
        pending.cancel()
    return _source(engine, request, chunks, _start(engine, request, chunks, rollouts))


def _source(
    engine: Engine, request: ChainRequest, chunks: Sequence[int], batch: RolloutBatch | None, *, behind: bool = False
) -> ChainSource:
    return ChainSource(request, chunks, batch, behind, batch is not None and engine.config.actors_differ)


def request_ahead(
    engine: Engine,
    state: TrainState,
    now: Sampling,
    chunks: Sequence[int],
    rollouts: Rollouts | None,
    total: WeightedSum,
) -> None:
    """Have the next update's chains sampled meanwhile, as it will request them if its plan stays what it is."""
    if not engine.config.train.ahead:
        return
    state.sampling = now
    if state.step + 1 < engine.config.train.iterations:
        state.pending = _start(engine, chain_request(engine, state.step + 1, now, total), chunks, rollouts)


def chain_request(engine: Engine, step: int, by: Sampling, total: WeightedSum) -> ChainRequest:
    """An update's chains, with the latents that its terms read."""
    surrogate, penalty = by.control_variate != 0, penalty_of(engine, step)
    plans = engine.plans(step, by.position_weights, surrogate=surrogate, trusted=by.trusted)
    kept = {*penalty.steps} if penalty else set[int]()
    if (engine.config.train.ahead or engine.config.actors_differ) and plans[0].score == "path":
        kept |= {sub_chain.stop for plan in plans for sub_chain in plan.sub_chains}
    if engine.config.actors_differ and (k := drift_step(engine, step, plans)) is not None:
        kept |= {k, k + 1}
    return ChainRequest(step, plans, by.theta, tuple(sorted(kept)), by.control_variate, by.trusted, total)


def local_chunks(engine: Engine, process: Process) -> list[int]:
    """The chunks that this process backpropagates, in whole groups that are sampled together."""
    train = engine.config.train
    chunks = range(train.chains // train.chunk_size)
    return [c for c in chunks if c // train.sampled_together % process.size == process.rank]


def drift_step(engine: PictureEngine, step: int, plans: Sequence[Plan]) -> int | None:
    """The denoising step at which an update's drift is measured, drawn from those that are sampled with noise."""
    sampled = min(plan.sampled for plan in plans)
    steps = [k for k in compared_steps(engine.sampler) if k < sampled]
    return steps[permutation(len(steps), engine.config.seed, "drift", step)[0]] if steps else None


def penalty_of(engine: Engine, step: int) -> Penalty | None:
    """The penalty on an update's divergence, at steps drawn evenly from all at which it is finite."""
    config, steps = engine.config, compared_steps(engine.sampler)
    if not config.compared_steps:
        return None
    drawn = permutation(len(steps), config.seed, "penalty", step)[: config.compared_steps]
    return Penalty(config.guards.kl_penalty, engine.model.initial_theta, [steps[i] for i in sorted(drawn)])


def _start(
    engine: Engine, request: ChainRequest, chunks: Sequence[int], rollouts: Rollouts | None
) -> RolloutBatch | None:
    """Have these chunks sampled elsewhere; None if nobody there samples as this process does, or no step is to be."""
    train = engine.config.train
    if rollouts is None or not engine.config.actors_sample or not any(request.plans[c].sampled for c in chunks):
        return None
    groups = [list(group) for _, group in groupby(chunks, lambda c: c // train.sampled_together)]
    return rollouts(request, [range(c[0] * train.chunk_size, (c[-1] + 1) * train.chunk_size) for c in groups])
