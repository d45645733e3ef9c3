"""One term's estimate with its own noise, and how much weight it deserves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TermEstimate:
    """A mean of independent estimates of one part of the gradient, with what they say of that mean's error."""

    gradient: Tensor  # [P]
    variance: float  # E |gradient - its expectation|^2; nan from fewer than 2 estimates

    @property
    def signal(self) -> float:
        """Unbiased estimate of |expectation|^2; may be negative."""
        return float(self.gradient.double().square().sum()) - self.variance


def term_estimate(mean: Tensor, mean_square: float, count: int) -> TermEstimate:
    """From `count` estimates: their mean [P] and the mean of their squared norms."""
    spread = mean_square - float(mean.double().square().sum())
    return TermEstimate(mean, max(spread, 0.0) / (count - 1) if count > 1 else float("nan"))


def average(estimates: Iterable[Tensor]) -> TermEstimate:
    """Mean of independent estimates [P] of equal weight, summed in the order given."""
    rows = list(estimates)
    total = torch.zeros_like(rows[0])
    for row in rows:
        total = total + row
    squares = sum(float(row.double().square().sum()) for row in rows)
    return term_estimate(total / len(rows), squares / len(rows), len(rows))


def mse_weight(signal: float, averaging: float) -> float:
    """The factor w that minimises E |w * estimate - expectation|^2, in [0, 1].

    `w = S / (S + V / m)`, from `signal` = S / V: S the squared norm of the expectation, V the estimate's variance, m
    how many updates the optimizer averages over (its momentum). Below 1 the sum of terms is no longer unbiased; it
    tends to 1 as V falls.
    """
    signal = max(signal, 0.0)
    return signal / (signal + 1 / averaging)
