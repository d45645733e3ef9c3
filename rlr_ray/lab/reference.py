"""What estimates are held against: every chunk's exact gradient, or where there is none a long unbiased average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.core.chain import sample_chain
from rlr_ray.core.first_order import step_gradients
from rlr_ray.core.gradient import Chains
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.lab.measure import Subject


@dataclass(frozen=True)
class Reference:
    """Each chunk's gradient, and what each step has of it; n chunks."""

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


def exact_reference(subject: Subject, chunks: int) -> Reference:
    """Checkpointed backpropagation through the whole chain of every chunk."""
    return _gather(subject, "full backpropagation", (exact_by_step(subject, subject.chains(c)) for c in range(chunks)))


def unbiased_reference(subject: Subject, chunks: int) -> Reference:
    """REINFORCE on every step, for rewards without a gradient: right on average, and noisy."""
    return _gather(subject, "REINFORCE", (reinforce_by_step(subject, subject.chains(c)) for c in range(chunks)))


def half_order_variances(subject: Subject, chunks: int) -> list[float]:  # [T]
    """Each step's variance per chain under REINFORCE; nan where the sampler adds no noise."""
    return _gather(subject, "", (reinforce_by_step(subject, subject.chains(c)) for c in range(chunks))).step_variances


def exact_by_step(subject: Subject, chains: Chains) -> Tensor:  # [T, P]
    start = (chains.x_start, chains.noise, chains.conditioning)
    trajectory = sample_chain(subject.denoiser, subject.theta, subject.schedule, *start, stop=0)
    arguments = (subject.denoiser, subject.theta, subject.schedule, trajectory, chains.objective)
    return step_gradients(*arguments)[0].cpu()


def reinforce_by_step(subject: Subject, chains: Chains) -> Tensor:  # [T, P]
    """Half order of every step alone, on one trajectory; nan where it cannot be."""
    start = (chains.x_start, chains.noise, chains.conditioning)
    trajectory = sample_chain(subject.denoiser, subject.theta, subject.schedule, *start)
    with torch.no_grad():
        advantage = leave_one_out(chains.objective(trajectory.latents[-1]), subject.groups)
    arguments = (subject.denoiser, subject.theta, subject.schedule, trajectory)
    noisy = [bool(sigma) for sigma in subject.schedule.sigma]
    silent = torch.full_like(subject.theta, float("nan"))
    rows = [half_order(*arguments, range(k, k + 1), advantage) if noisy[k] else silent for k in range(len(noisy))]
    return torch.stack(rows).cpu()


def _gather(subject: Subject, kind: str, gradients: Iterable[Tensor]) -> Reference:
    """From each chunk's gradient by step [T, P]; only sums over chunks are kept of the single steps."""
    rows: list[Tensor] = []
    halves: list[Tensor] = []  # sums over even and over odd chunks: independent
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
