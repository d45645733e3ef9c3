"""The order of prompts in training: a function of the run's seed and of the slot's number alone."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from rlr_ray.core.seeds import permutation, seed_of

_TURN = 2**32
_GOLDEN = 2654435769  # the turn over the golden ratio


def prompt_order(count: int, slot: int, *seed: int | str) -> int:
    """Index of the prompt that serves as number `slot`: each of `count` once, in random order, then all again."""
    round_number, position = divmod(slot, count)
    return _round(count, *seed, "prompts", round_number)[position]


@functools.lru_cache(maxsize=2)  # of a million prompts one takes a twentieth of a second
def _round(count: int, *names: int | str) -> list[int]:
    return permutation(count, *names)


class PromptOrder:
    """Index of the one of n weighted prompts that serves as number `slot`; for equal weights `prompt_order`.

    Systematic sampling: on [0, n) prompt i owns an interval as long as its share s_i = n w_i / sum(w), and the n slots
    of a round, in random order, are the points u, u + 1, ..., u + n - 1. So each round has prompt i floor(s_i) or
    ceil(s_i) times. u turns by the golden ratio from round to round, so that over R rounds the count stays within
    O(log R) of R s_i, where independent draws would stray by sqrt(R s_i).
    """

    def __init__(self, weights: Sequence[float], *seed: int | str):
        self._ends = _ends(weights)
        self._seed = seed

    def __call__(self, slot: int) -> int:
        count = len(self._ends)
        turned = seed_of(*self._seed, "prompts", "offset") + slot // count * _GOLDEN
        point = prompt_order(count, slot, *self._seed) + turned % _TURN / _TURN  # exact below 2**21 prompts
        return bisect_right(self._ends, point)


def _ends(weights: Sequence[float]) -> list[float]:  # [n]
    """The end of each prompt's interval; exact, so that equal weights own [i, i + 1)."""
    if min(weights) == max(weights):
        return [float(end) for end in range(1, len(weights) + 1)]
    sums = list(accumulate(map(Fraction, weights)))
    return [float(len(sums) * end / sums[-1]) for end in sums]
