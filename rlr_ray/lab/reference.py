"""The reference of estimates: every batch's exact gradient, or where there is none a long unbiased average.

T steps: those that are theta's, all but the last ones of the base model.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlr_ray.core.first_order import step_gradients
from rlr_ray.core.half_order import half_order, leave_one_out
from rlr_ray.core.plan_shape import inverse_probabilities
from rlr_ray.lab.measure import LEAST_BATCHES, Subject

logger = logging.getLogger(__name__)
Spread = tuple[float, float]  # a mean square or a variance per chain, and its standard error


@dataclass(frozen=True)
class Reference:
    """Each batch's gradient, and what each step has of it; n batches."""

    kind: str  # how it was got, in words
    rows: Tensor  # [n, P]
    signals: list[float]  # [T] squared norm of each step's expected gradient, unbiased; may be negative
    step_variances: list[float]  # [T] per chain, of first order where it is exact, else of half order

    def position_norms(self, length: int) -> list[float | None]:
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


def chain_gradients(subject: Subject, batches: int) -> Iterator[Tensor]:  # each [T, B, P], of a chunk's B chains
    """The exact gradient of every single chain through each step.

    Theta stands once a chain, so one backward pass of a chunk leaves its chains apart, and takes T B P numbers.
    """
    for number in range(batches):
        for chains in subject.batch(number):
            theta = subject.theta.expand(len(chains.x_start), -1)
            trajectory = subject.sampler.sample(theta, *chains.start, stop=0)
            yield len(theta) * step_gradients(subject.sampler, theta, trajectory, chains.objective)[0].cpu()


def chain_squares(subject: Subject, batches: int) -> list[Spread]:  # [T]
    """E |g_b|^2 and its standard error, g_b one chain's exact gradient through each step, from all chains of batches.

    A few chains say nothing of it: where gradients have heavy tails, rare chains make most of it. Nor is it a batch's
    variance times its chains: what prompts differ in is shared by all of a prompt's chains there.
    """
    squares = [steps.double().square().sum(2) for steps in chain_gradients(subject, batches)]
    rows = torch.cat(squares, 1)  # [T, n]
    return list(zip(rows.mean(1).tolist(), (rows.std(1) / rows.shape[1] ** 0.5).tolist(), strict=True))


def exact_by_step(subject: Subject, number: int) -> Tensor:  # [T, P]
    """A batch's exact gradient through each step."""
    total = torch.zeros(subject.sampler.trained, len(subject.theta), dtype=subject.theta.dtype)
    chunks = subject.batch(number)
    for chains in chunks:
        start = chains.start
        trajectory = subject.sampler.sample(subject.theta, *start, stop=0)
        arguments = (subject.sampler, subject.theta, trajectory, chains.objective)
        total += step_gradients(*arguments)[0].cpu()
    return total / len(chunks)


def reinforce_by_step(subject: Subject, number: int) -> Tensor:  # [T, P]
    """Half order of every step alone on a batch; nan where it cannot be: no noise, or no baseline."""
    total = torch.zeros(subject.sampler.trained, len(subject.theta), dtype=subject.theta.dtype)
    if int(subject.groups.bincount().min()) < 2:
        return torch.full_like(total, float("nan"))
    chunks = subject.batch(number)
    starts = [chains.start for chains in chunks]
    trajectories = [subject.sampler.sample(subject.theta, *start) for start in starts]
    with torch.no_grad():
        pairs = zip(chunks, trajectories, strict=True)
        rewards = torch.cat([chains.objective(trajectory.latents[-1]) for chains, trajectory in pairs])
    advantages = leave_one_out(rewards, subject.groups).chunk(len(chunks))
    for k in range(subject.sampler.trained):
        if not subject.sampler.schedule.sigma[k]:
            total[k] = float("nan")
            continue
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            arguments = (subject.sampler, subject.theta, trajectory, range(k, k + 1), advantage)
            total[k] += half_order(*arguments).cpu()
    return total / len(chunks)


def _gather(subject: Subject, kind: str, gradients: Iterable[Tensor]) -> Reference:
    """From each batch's gradient by step [T, P]; only sums over batches are kept of the single steps."""
    rows: list[Tensor] = []
    halves: list[Tensor] = []  # sums over even and over odd batches: independent
    squares = torch.zeros(subject.sampler.trained, dtype=torch.float64)
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


@dataclass
class Moments:
    """Running mean and spread of estimates [P]."""

    mean: Tensor = field(default_factory=lambda: torch.zeros(()))  # [P]
    parts: list[float] = field(default_factory=list)  # what each added to the sum of squared deviations (Welford)

    def add(self, estimate: Tensor) -> None:
        off = estimate.double() - self.mean
        self.mean = self.mean + off / (self.count + 1)
        self.parts.append(float((off * (estimate.double() - self.mean)).sum()))

    @property
    def count(self) -> int:
        return len(self.parts)

    def variance(self) -> float:
        """E |estimate - expectation|^2."""
        return sum(self.parts) / (self.count - 1)

    def variance_se(self) -> float:
        """Standard error of the variance."""
        return statistics.stdev(self.parts[1:]) / self.count**0.5 if self.count > 2 else float("inf")


class PlanSweep:
    """Statistics by K of the batches seen so far; `size` chains each, variances per chain."""

    def __init__(self, steps: int, size: int, exact: bool):
        self.steps, self.size, self.exact = steps, size, exact  # exact: the reward has a gradient
        self.last = [Moments() for _ in range(steps + 1)]  # first order on the last K
        self.mixed = [Moments() for _ in range(steps + 1)]  # with REINFORCE on the others
        self.first_order = [Moments() for _ in range(steps)]  # the exact gradient of one step
        self.half_order = [Moments() for _ in range(steps)]  # REINFORCE on one step
        leasts = sorted({max(steps * part // 4, 1) for part in range(4)})
        self.roulettes: dict[int, list[float]] = {least: [] for least in leasts}  # each batch's mean squared norm
        self.rows: list[Tensor] = []  # each batch's gradient [P], exact if there is one

    def add(self, exact: Tensor, reinforce: Tensor) -> None:  # [T, P], [T, P]; nan where REINFORCE cannot be
        zero = torch.zeros_like(exact[:1])
        last = torch.cat([zero, exact.flip(0).cumsum(0)])  # [T + 1, P] by K
        others = torch.cat([zero, reinforce.cumsum(0)]).flip(0)  # [T + 1, P] by K
        for k in range(self.steps + 1):
            self.last[k].add(last[k])
            self.mixed[k].add(last[k] + others[k])
        for k in range(self.steps):
            self.first_order[k].add(exact[k])
            self.half_order[k].add(reinforce[k])
        for least in self.roulettes:
            self.roulettes[least].append(roulette_square(exact, least))
        self.rows.append(last[-1] if self.exact else others[0])

    def reinforce_variance(self, k: int) -> Spread:
        """Variance of first order on the last k steps and REINFORCE on the others."""
        return self._spread(self.mixed[k])

    def truncated_variance(self, k: int) -> Spread:
        """Variance of first order on the last k steps alone."""
        return self._spread(self.last[k])

    def _spread(self, moments: Moments) -> Spread:
        return self.size * moments.variance(), self.size * moments.variance_se()

    def truncated_bias(self, k: int) -> float:
        """Relative bias along the gradient of first order on the last k steps alone."""
        g = self.last[self.steps].mean
        return float(self.last[k].mean @ g / (g @ g)) - 1

    def roulette_variance(self, least: int) -> Spread:
        """Variance of Russian roulette over at least `least` steps (of `roulettes`), its depth averaged exactly."""
        mean = self.last[self.steps].mean
        square = float(mean @ mean)
        pairs = zip(self.roulettes[least], self.rows, strict=True)
        parts = [moment - 2 * float(row.double() @ mean) + square for moment, row in pairs]  # about the mean
        count = len(parts)
        return self.size * sum(parts) / (count - 1), self.size * statistics.stdev(parts) / count**0.5

    def signal(self, k: int) -> float:
        """Squared norm of the expected gradient through step k, unbiased."""
        moments = self.first_order[k]
        return float(moments.mean.double().square().sum()) - moments.variance() / moments.count


def roulette_square(exact: Tensor, least: int) -> float:
    """Mean over the depth K, uniform on least .. T, of the squared norm of Russian roulette's estimate.

    `exact` [T, P] is a batch's gradient by step. An estimate of depth K is the sum over the last K steps of the
    step's gradient divided by the probability that it is reached.
    """
    weights = torch.tensor(inverse_probabilities(len(exact), least), dtype=exact.dtype)
    estimates = (weights[:, None] * exact).flip(0).cumsum(0)  # [T, P] by depth
    return float(estimates[least - 1 :].double().square().sum(1).mean())


def gather(subject: Subject, exact: bool, batches: int, patience_s: float = float("inf")) -> PlanSweep:
    """Statistics of `batches` batches, or of as many, but 8 at least, as `patience_s` allows."""
    sweep = PlanSweep(subject.sampler.trained, len(subject.groups), exact)
    started = time.monotonic()
    for number in range(batches):
        if number % 8 == 0:
            logger.info(f"batch {number} of {batches} at most, {len(subject.groups)} chains each")
        reinforce = reinforce_by_step(subject, number)
        sweep.add(exact_by_step(subject, number) if exact else torch.zeros_like(reinforce), reinforce)
        if number + 1 >= LEAST_BATCHES and time.monotonic() - started > patience_s:
            break
    return sweep
