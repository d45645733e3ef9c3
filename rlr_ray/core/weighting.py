"""A term's estimate with its own noise, and the weight that this noise leaves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from rlr_ray.core.sums import square_norm


@dataclass(frozen=True)
class Cut:
    """The part of a term's estimates that clipping removed."""

    share: float  # of the estimates that were cut, 0 .. 1
    length: float  # of their summed norms that was lost, 0 .. 1


def cut_at(sizes: Tensor, limit: float) -> Cut:  # [n]
    """The part that a limit removes of estimates of these norms."""
    whole = float(sizes.sum())
    kept = float(sizes.clamp(max=limit).sum())
    return Cut(float((sizes > limit).double().mean()), 1 - kept / whole if whole else 0.0)


@dataclass(frozen=True)
class TermEstimate:
    """A mean of independent estimates of one part of the gradient, with what they say of that mean's error."""

    gradient: Tensor  # [P]
    variance: float  # E |gradient - its expectation|^2; nan from fewer than 2 estimates
    cut: Cut | None = None  # of its estimates; None: none is clipped

    @property
    def signal(self) -> float:
        """Unbiased estimate of |expectation|^2; may be negative."""
        return square_norm(self.gradient) - self.variance


def term_estimate(mean: Tensor, mean_square: float, count: int, cut: Cut | None = None) -> TermEstimate:
    """From `count` estimates: their mean [P] and the mean of their squared norms."""
    spread = mean_square - square_norm(mean)
    return TermEstimate(mean, max(spread, 0.0) / (count - 1) if count > 1 else float("nan"), cut)


def mse_weight(signal: float, averaging: float) -> float:
    """The factor w that minimises E |w * estimate - expectation|^2, in [0, 1].

    `w = S / (S + V / m)`, from `signal` = S / V: S the squared norm of the expectation, V the estimate's variance, m
    how many updates the optimizer averages over (its momentum). Below 1 the sum of terms is no longer unbiased; it
    tends to 1 as V falls.
    """
    signal = max(signal, 0.0)
    return signal / (signal + 1 / averaging)


Moments = tuple[float, float, float]  # sums over chains of q^2, q r and r^2


def moments(scores: Tensor, rewards: Tensor, groups: Tensor) -> Moments:  # each [B]
    """Second moments of Q's scores and the rewards within their groups: less the group's mean.

    What groups differ in is what half order's baseline takes away, so a surrogate that only tells prompts apart counts
    for nothing. A group of one chain adds nothing.
    """
    same = (groups[:, None] == groups[None, :]).double()  # [B, B]
    q, r = (x.double() - same @ x.double() / same.sum(1) for x in (scores, rewards))
    return float(q @ q), float(q @ r), float(r @ r)


def correlation_and_slope(batches: Iterable[Moments]) -> tuple[float, float]:
    """Correlation of Q and R over some batches, and the slope c of R on Q; 0 and 0 where either does not vary.

    The slope minimises the mean square of the residual R - c Q. Half order's estimate stays unbiased for a c that does
    not depend on the chains it is used on; one regressed on the same chains is not (tests/core/test_surrogate.py).
    """
    qq, qr, rr = (sum(column) for column in zip((0.0, 0.0, 0.0), *batches, strict=True))
    return (qr / (qq * rr) ** 0.5, qr / qq) if qq > 0 and rr > 0 else (0.0, 0.0)
