"""Positions of sub-chains. They are drawn before the update's chains are, so no law of them brings a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlr_ray.core.seeds import generator


def uniform_blocks(low: int, stop: int, length: int, count: int, *seed: int | str) -> list[range]:
    """`count` disjoint blocks of `length` steps in steps low .. stop-1, every arrangement equally likely.

    Blocks are shrunk to single slots, which are drawn without replacement by Floyd's algorithm.
    """
    slots = stop - low - count * (length - 1)
    source = generator(*seed)
    drawn: set[int] = set()
    for last in range(slots - count, slots):
        slot = int(torch.randint(0, last + 1, (), generator=source))
        drawn.add(last if slot in drawn else slot)
    starts = [low + slot + i * (length - 1) for i, slot in enumerate(sorted(drawn))]
    return [range(start, start + length) for start in starts]


def weighted_block(low: int, stop: int, length: int, weights: Sequence[float], *seed: int | str) -> range:
    """A block in steps low .. stop-1 whose start is drawn with probability proportional to `weights` [T] there."""
    allowed = torch.tensor(weights[low : stop - length + 1], dtype=torch.float64)
    start = low + int(torch.multinomial(allowed, 1, generator=generator(*seed)))
    return range(start, start + length)


def covering_blocks(low: int, stop: int, length: int) -> list[range]:
    """Consecutive blocks of `length` steps that cover steps low .. stop-1; the first is shorter if it must be."""
    return [range(max(end - length, low), end) for end in range(stop, low, -length)][::-1]


def softmax_of_norms(norms: Sequence[float | None]) -> list[float]:
    """Weights of the places from measured gradient norms: `softmax(norm / mean norm)`.

    The paper draws j from the softmax of the norms themselves; in units of their mean, so that the law does not
    depend on the reward's scale. A place that was not measured yet (None) counts as the mean.
    """
    known = [norm for norm in norms if norm is not None]
    mean = sum(known) / len(known) if known else 0.0
    if not mean:
        return [1.0] * len(norms)
    relative = torch.tensor([1.0 if norm is None else norm / mean for norm in norms], dtype=torch.float64)
    weights: list[float] = relative.softmax(0).tolist()
    return weights
