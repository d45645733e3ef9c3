"""How far a surrogate Q follows the reward R, and how much of it first order should carry."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

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
