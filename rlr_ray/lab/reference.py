"""What estimates are held against: every batch's exact gradient, or where there is none a long unbiased average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.core.chain import sample_chain
from rlr_ray.core.first_order import step_gradients
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.lab.measure import Subject


@dataclass(frozen=True)
class Reference:
    """Each batch's gradient, and what each step has of it; n batches."""

    kind: str  # how it was got, in words
    rows: Tensor  # [n, P]
    signals: list[float]  # [T] squared norm of each step's expected gradient, unbiased; may be negative
    step_variances: list[float]  # [T] per chain, of first order where it is exact, else of half order

    def place_norms(self, length: int) -> list[float | None]:
        """Norm of the gradient of the sub-chain of `length` steps that starts at each step, as if steps were apart."""
        if not length:
            return []
        last = len(self.signals) - length
        sums = [sum(self.signals[start : start + length]) for start in range(last + 1)]
        return [max(total, 0.0) ** 0.5 for total in sums] + [None] * (length - 1)


def exact_reference(subject: Subject, batches: int) -> Reference:
    """Checkpointed backpropagation through the whole chain of every batch."""
    return _gather(subject, "full backpropagation", (exact_by_step(subject, number) for number in range(batches)))


def unbiased_reference(subject: Subject, batches: int) -> Reference:
    """REINFORCE on every step, for rewards without a gradient: right on average, and noisy."""
    return _gather(subject, "REINFORCE", (reinforce_by_step(subject, number) for number in range(batches)))


def half_order_variances(subject: Subject, batches: int) -> list[float]:  # [T]
    """Each step's variance per chain under REINFORCE; nan where the sampler adds no noise."""
    return _gather(subject, "", (reinforce_by_step(subject, number) for number in range(batches))).step_variances


def exact_by_step(subject: Subject, number: int) -> Tensor:  # [T, P]
    """A batch's exact gradient through each step."""
    total = torch.zeros(len(subject.schedule), len(subject.theta), dtype=subject.theta.dtype)
    chunks = subject.batch(number)
    for chains in chunks:
        start = chains.start
        trajectory = sample_chain(subject.denoiser, subject.theta, subject.schedule, *start, stop=0)
        arguments = (subject.denoiser, subject.theta, subject.schedule, trajectory, chains.objective)
        total += step_gradients(*arguments)[0].cpu()
    return total / len(chunks)


def reinforce_by_step(subject: Subject, number: int) -> Tensor:  # [T, P]
    """Half order of every step alone on a batch; nan where it cannot be: no noise, or no baseline."""
    total = torch.zeros(len(subject.schedule), len(subject.theta), dtype=subject.theta.dtype)
    if int(subject.groups.bincount().min()) < 2:
        return torch.full_like(total, float("nan"))
    chunks = subject.batch(number)
    starts = [chains.start for chains in chunks]
    trajectories = [sample_chain(subject.denoiser, subject.theta, subject.schedule, *start) for start in starts]
    with torch.no_grad():
        pairs = zip(chunks, trajectories, strict=True)
        rewards = torch.cat([chains.objective(trajectory.latents[-1]) for chains, trajectory in pairs])
    advantages = leave_one_out(rewards, subject.groups).chunk(len(chunks))
    for k, sigma in enumerate(subject.schedule.sigma):
        if not sigma:
            total[k] = float("nan")
            continue
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            arguments = (subject.denoiser, subject.theta, subject.schedule, trajectory, range(k, k + 1), advantage)
            total[k] += half_order(*arguments).cpu()
    return total / len(chunks)


def _gather(subject: Subject, kind: str, gradients: Iterable[Tensor]) -> Reference:
    """From each batch's gradient by step [T, P]; only sums over batches are kept of the single steps."""
    rows: list[Tensor] = []
    halves: list[Tensor] = []  # sums over even and over odd batches: independent
    squares = torch.zeros(len(subject.schedule), dtype=torch.float64)
    for number, steps in enumerate(gradients):
        rows.append(steps.sum(0))
        squares += steps.double().square().sum(1)
        if number < 2:
            halves.append(steps.clone())
        else:
            halves[number % 2] += steps
    n, size = len(rows), len(subject.groups)
    even, odd = (n + 1) // 2, n // 2
    signals = (halves[0].double() * halves[1].double()).sum(1) / (even * odd)
    variances = size * (squares / n - signals)
    return Reference(kind, torch.stack(rows), signals.tolist(), variances.tolist())
