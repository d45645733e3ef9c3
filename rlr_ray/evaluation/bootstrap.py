"""Paired scores compared: mean difference and win rate, with confidence intervals. n chains, G prompts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy import stats
from torch import Tensor

Interval = tuple[float, float]

_RESAMPLES = 9999
_ENOUGH = 20  # prompts, that they stand for others


@dataclass(frozen=True)
class Comparison:
    """Scores of the same chains by the base model and by a tuned one, of one reward or judge."""

    base: float  # mean
    tuned: float  # mean
    difference: float
    interval: Interval  # of the difference
    win_rate: float  # share of chains that the tuned model's score is higher of, ties as half
    win_interval: Interval


def unit(groups: Sequence[int]) -> str:
    """The unit that intervals resample: "prompts" if there are many with several chains each, else "chains".

    Chains of one prompt are alike, so what is said of prompts that were not drawn rests on G prompts, not on n chains:
    whole prompts are resampled. With fewer than 20, G is too small for that (the interval would cover too seldom) and
    they are often all that matter, such as the ten digits: then chains are resampled, and the interval speaks of these
    prompts alone, a little too wide, since prompts differ less among n fixed shares than among n draws.
    """
    prompts = len(set(groups))
    return "prompts" if _ENOUGH <= prompts < len(groups) else "chains"


def compare(base: Tensor, tuned: Tensor, groups: Sequence[int], level: float) -> Comparison:
    """Scores [n] of the same n chains, of the prompts that `groups` number."""
    before, after = base.double().numpy(), tuned.double().numpy()
    wins = (after > before) + 0.5 * (after == before)
    return Comparison(
        float(before.mean()),
        float(after.mean()),
        float((after - before).mean()),
        mean_interval(after - before, groups, level),
        float(wins.mean()),
        _share_interval(wins, groups, level),
    )


def mean_interval(values: numpy.ndarray, groups: Sequence[int], level: float) -> Interval:
    """Bootstrap interval of the mean of values [n], which resamples what `unit` says; the same numbers every time.

    BCa (bias-corrected and accelerated, Efron 1987), the percentile method where that is undefined. Both cover less
    than `level` with few units: of a normal sample of 10, a nominal 95 % is about 90 %.
    """
    sums, sizes = _units(values, groups)

    def mean(sums: numpy.ndarray, sizes: numpy.ndarray, axis: int) -> numpy.ndarray:
        return sums.sum(axis) / sizes.sum(axis)

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's of values that are all alike
            interval = stats.bootstrap(
                (sums, sizes),
                mean,
                paired=True,
                vectorized=True,
                n_resamples=_RESAMPLES,
                batch=1000,
                confidence_level=level,
                method=method,
                rng=numpy.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            break
    return float(interval.low), float(interval.high)


def _units(values: numpy.ndarray, groups: Sequence[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Sum and number of each unit's values."""
    if unit(groups) == "chains":
        return values, numpy.ones_like(values)
    _, index = numpy.unique(groups, return_inverse=True)
    return numpy.bincount(index, values), numpy.bincount(index).astype(float)


def _share_interval(wins: numpy.ndarray, groups: Sequence[int], level: float) -> Interval:
    """As `mean_interval`; at 0 or 1, where every resample is the same, Clopper and Pearson's of so many units."""
    share = float(wins.mean())
    if share not in (0.0, 1.0):
        return mean_interval(wins, groups, level)
    units = len(_units(wins, groups)[0])
    exact = stats.binomtest(int(share) * units, units).proportion_ci(level, method="exact")
    return float(exact.low), float(exact.high)
