"""Memory and seconds of an update's parts, each measured on one chunk of a recipe's chains."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order
from rlr_ray.core.plan import Plan
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains, Trajectory
from rlr_ray.core.zeroth_order import rollout
from rlr_ray.lab.measure import Subject
from rlr_ray.train.engine import Engine
from rlr_ray.utils.memory import peak_bytes

_CHECKPOINTED_STEPS = 4  # further ones add little, so the slope is taken over a few


@dataclass(frozen=True)
class Probe:
    memory: MemoryModel
    seconds: dict[str, float]  # per chunk: forward (one step), backward (one step), rollout (a chunk of pairs)

    def update_seconds(self, run: RunConfig, plans: Sequence[Plan]) -> float:
        """Seconds of an update in one process, on average over the plans."""
        seconds, zeroth, pulled = self.seconds, run.estimator.zeroth_order, run.estimator.half_order.pull > 0
        forwards = sum(plan.forwards(run.estimator.checkpointed, pulled=pulled) for plan in plans) / len(plans)
        backwards = sum(plan.backwards for plan in plans) / len(plans)
        chunk = forwards * seconds["forward"] + backwards * seconds["backward"]
        rollouts = zeroth.count / zeroth.chunk_size if run.plan_shape.has_zeroth_order else 0
        return chunk * run.train.chains / run.train.chunk_size + rollouts * seconds["rollout"]


def probe(engine: Engine, subject: Subject, *, differentiable: bool) -> Probe:
    """Run every part a few times. A part that cannot be (no gradient of the reward, no noise) is left at 0."""
    work = Work(engine, subject)
    steps = subject.sampler.trained
    peaks = {name: peak_bytes(part, engine.device) for name, part in work.parts(steps, differentiable).items()}
    memory = MemoryModel(
        work.held(),
        peaks["sampling"],
        _line(peaks, "plain", min(2, steps)),
        _line(peaks, "checkpointed", min(_CHECKPOINTED_STEPS, steps)),
        _line(peaks, "half", min(2, steps)),
        peaks["rollout"],
    )
    chunks = len(work.together.x_start) / len(work.chains.x_start)
    forward = _seconds(work.sampling, engine.device) / len(subject.sampler) / chunks
    deeper = functools.partial(work.first_order, min(2, steps), False) if differentiable else work.sampling
    once = functools.partial(work.first_order, 1, False) if differentiable else work.sampling
    both = _seconds(deeper, engine.device) - _seconds(once, engine.device)  # a step forward and back
    seconds = {
        "forward": forward,
        "backward": max(both - forward, forward),
        "rollout": _seconds(work.rollout, engine.device),
    }
    return Probe(memory, seconds)


def _line(peaks: Mapping[str, int], name: str, count: int) -> Line:
    first, last = peaks.get(f"{name} 1", 0), peaks.get(f"{name} {count}", 0)
    return Line(first, max(last - first, 0) / (count - 1) if count > 1 else 0.0)


class Work:
    """The parts of an update as functions that can be run and measured."""

    def __init__(self, engine: Engine, subject: Subject):
        self.engine, self.subject = engine, subject
        self.chains = subject.batch(0)[0]
        self.trajectory = self._chain(self.chains)
        train = engine.config.train
        self.together = engine.train_chains(0, range(min(train.sampled_together * train.chunk_size, train.chains)))
        zeroth = engine.config.estimator.zeroth_order
        self.pairs = engine.train_chains(0, range(zeroth.chunk_size))

    def parts(self, steps: int, differentiable: bool) -> dict[str, Callable[[], Any]]:
        parts: dict[str, Callable[[], Any]] = {"sampling": self.sampling, "rollout": self.rollout}
        if all(self.subject.sampler.schedule.sigma[:2]):
            parts |= {f"half {h}": functools.partial(self.half_order, h) for h in (1, min(2, steps))}
        if differentiable:
            counts = {"plain": (1, min(2, steps)), "checkpointed": (1, min(_CHECKPOINTED_STEPS, steps))}
            for name, (one, more) in counts.items():
                saving = name == "checkpointed"
                parts |= {f"{name} {k}": functools.partial(self.first_order, k, saving) for k in (one, more)}
        return parts

    def sampling(self) -> Tensor:
        """As many chains as are sampled at once, without gradients; of them a chunk is decoded and rated."""
        with torch.no_grad():
            return self.chains.objective(self._chain(self.together).latents[-1, : len(self.chains.x_start)])

    def _chain(self, chains: Chains) -> Trajectory:
        subject = self.subject
        return subject.sampler.sample(subject.theta, *chains.start)

    def first_order(self, steps: int, checkpoint_steps: bool) -> Any:
        whole, subject = self.trajectory, self.subject
        begun = subject.sampler.trained - steps + 1  # latents
        start = Trajectory(whole.latents[:begun], whole.noise, whole.conditioning)
        arguments = (subject.sampler, subject.theta, start, self.chains.objective)
        return first_order(*arguments, checkpoint_steps=checkpoint_steps)

    def half_order(self, length: int) -> Any:
        """At the chain's start; memory does not depend on the place."""
        subject, advantage = self.subject, self.subject.theta.new_ones(len(self.chains.x_start))
        arguments = (subject.sampler, subject.theta, self.trajectory)
        return half_order(*arguments, range(length), advantage)

    def rollout(self) -> Any:
        subject, steps = self.subject, len(self.subject.sampler)
        directions = torch.zeros(len(self.pairs.x_start), len(subject.theta)).to(subject.theta)
        plan = PlanShape(steps, 0, 0).draw("probe")
        return rollout(subject.sampler, subject.theta, plan, self.pairs, directions, 0.0)

    def held(self) -> float:
        """Bytes that an update holds all along: weights, chains and trajectories, sums of gradients, the optimizer."""
        config, latent = self.engine.config, self.chains.x_start
        trajectory = _bytes(latent) / len(latent) * 2 * (len(self.subject.sampler) + 1)
        gradients = _bytes(self.subject.theta) * 12  # exact sums, two terms; optimizer, guides
        return self.engine.held_bytes() + config.train.chains * trajectory + gradients


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median of three runs."""
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Line:
    """Bytes of a part with n differentiated steps: `first + (n - 1) * further`."""

    first: float
    further: float

    def at(self, steps: int) -> float:
        return self.first + (steps - 1) * self.further if steps else 0.0


@dataclass(frozen=True)
class MemoryModel:
    """Peak bytes of one process that does all of an update; its parts follow each other, so the worst one counts.

    Every part is measured on one chunk, beyond what is held all along.
    """

    held: float  # weights, the update's chains and trajectories, sums of gradients
    sampling: float  # a chunk's chains without gradients
    first_order: Line  # plain backpropagation of the last K steps, the decoder and the reward
    first_order_checkpointed: Line
    half_order: Line  # a sub-chain of h steps
    rollout: float  # a chunk of perturbation pairs

    def parts(self, shape: PlanShape, checkpoint_steps: bool) -> dict[str, float]:
        """Bytes of each part that the plan has, beyond what is held. A random depth counts as the whole chain."""
        depth = shape.first_order_steps if shape.truncation == "fixed" else shape.trained
        line = self.first_order_checkpointed if checkpoint_steps else self.first_order
        length = max(shape.sub_chain_length, 1) if shape.has_half_order else 0
        return {
            "sampling": self.sampling,
            "first_order": line.at(depth),
            "half_order": self.half_order.at(length),
            "zeroth_order": self.rollout if shape.has_zeroth_order else 0.0,
        }

    def peak(self, shape: PlanShape, checkpoint_steps: bool) -> float:
        """Bytes at the worst moment of an update."""
        return self.held + max(self.parts(shape, checkpoint_steps).values())


def closed_form_length(
    budget: float,
    memory_half: float,  # B_h
    memory_zeroth: float,  # B_z
    variance_half: float,  # V_h
    variance_zeroth: float,  # V_z
    steps: int,  # T
) -> int:
    """The paper's h* (equation 8), at least 0:

    `min(floor((B - B_z (T-1)) / (B_h - B_z)), floor(T V_z / (2 (V_z - V_h)) - 1))`, from the memory model
    `B_h h + B_z (T - 1 - h) <= B` of steps whose memory adds up. Where zeroth order costs no less memory or has no more
    variance than half order, the paper's premises fail: then the term with them does not bind.
    """
    by_memory = by_variance = math.inf
    if memory_half > memory_zeroth:
        by_memory = (budget - memory_zeroth * (steps - 1)) / (memory_half - memory_zeroth)
    if variance_zeroth > variance_half:
        by_variance = steps * variance_zeroth / (2 * (variance_zeroth - variance_half)) - 1
    return max(math.floor(min(by_memory, by_variance, steps - 1)), 0)
