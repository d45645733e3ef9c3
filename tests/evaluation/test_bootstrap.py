"""Intervals against known means and closed forms, win rates against counting."""

from __future__ import annotations

import numpy
import pytest
import torch

from rlr_ray.evaluation.bootstrap import compare, mean_interval, unit

TRIALS = 200  # the standard error of a coverage of .95 is .0154


def test_whole_prompts_are_resampled_where_there_are_many_with_several_chains() -> None:
    assert unit([0, 1] * 50) == "chains"
    assert unit(range(50)) == "chains"  # the same as prompts, of one chain each
    assert unit([i % 20 for i in range(50)]) == "prompts"


def test_the_interval_of_paired_differences_covers_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(TRIALS):
        start = 5 * torch.randn(40, generator=generator)  # what pairing takes out
        gain = 0.3 + torch.empty(40).exponential_(generator=generator) - 1  # skewed, mean .3
        found = compare(start, start + gain, [0] * 40, 0.95)
        low, high = found.interval
        assert low <= found.difference <= high
        covered += low <= 0.3 <= high
    assert abs(covered / TRIALS - 0.95) < 3 * 0.0154


def test_the_interval_over_prompts_covers_the_mean_over_prompts_that_were_not_drawn() -> None:
    random, groups = numpy.random.default_rng(0), [i % 25 for i in range(100)]
    covered, by_chains = 0, 0
    for _ in range(TRIALS):
        values = random.normal(0.3, 1, 25)[groups] + random.normal(0, 0.5, 100)
        low, high = mean_interval(values, groups, 0.95)
        covered += low <= 0.3 <= high
        low, high = mean_interval(values, range(100), 0.95)
        by_chains += low <= 0.3 <= high
    assert 0.95 - 0.02 - 3 * 0.0154 < covered / TRIALS < 0.95 + 3 * 0.0154  # 25 units cover .02 less
    assert by_chains / TRIALS < 0.8  # what chains as units would have claimed


def test_the_win_rate_counts_ties_as_half() -> None:
    base = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    found = compare(base, torch.tensor([1.0, 1.0, 3.0, 2.0, 5.0]), [0] * 5, 0.95)
    assert found.win_rate == (3 + 0.5) / 5
    assert 0 <= found.win_interval[0] < found.win_rate < found.win_interval[1] <= 1


def test_a_win_on_every_chain_is_not_certainty() -> None:
    base = torch.arange(10.0)
    assert compare(base, base + 1, [0] * 10, 0.95).win_interval == pytest.approx((0.025 ** (1 / 10), 1.0))
    assert compare(base, base - 1, [0] * 10, 0.95).win_interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))


def test_scores_that_do_not_change_have_an_interval_of_no_width() -> None:
    base = torch.arange(10.0)
    found = compare(base, base, [0] * 10, 0.95)
    assert found.interval == (0.0, 0.0) and found.win_rate == 0.5 and found.win_interval == (0.5, 0.5)


def test_an_interval_repeats_and_widens_with_its_level() -> None:
    values = numpy.random.default_rng(1).normal(size=30)
    (low, high), (lower, higher) = (mean_interval(values, [0] * 30, level) for level in (0.8, 0.99))
    assert lower < low < values.mean() < high < higher
    assert mean_interval(values, [0] * 30, 0.8) == (low, high)
