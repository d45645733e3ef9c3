"""Plans: every step has one owner, places follow their law, and what does not fit is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.positions import softmax_of_norms
from rlr_ray.lab.toy import toy_schedule


@pytest.mark.parametrize("place", ["uniform", "importance", "cover"])
@pytest.mark.parametrize("rest", ["zeroth_order", "half_order", "none"])
def test_every_step_has_at_most_one_owner_and_one_if_unbiased(rest: str, place: str) -> None:
    for first, length, count, seed in itertools.product(range(11), range(11), (1, 2, 3), range(3)):
        if first + length * count > 10 or (count > 1 and place != "uniform"):
            continue
        shape = PlanShape(10, first, length, place, rest, count)  # type: ignore[arg-type]
        plan = shape.draw(seed, position_weights=[1.0] * 10)
        owned = [*plan.first_order, *(k for chain in plan.sub_chains for k in chain), *plan.zeroth_order]
        assert len(owned) == len(set(owned))
        assert (set(owned) == set(range(10))) != shape.biased
        assert bool(plan.zeroth_order) == shape.has_zeroth_order
        assert bool(plan.sub_chains) == shape.has_half_order
        assert plan.forwards() == 10 + sum(map(len, plan.sub_chains))
        assert plan.forwards(checkpoint_steps=True) == plan.forwards() + first


def test_a_surrogate_leaves_every_step_to_the_other_orders() -> None:
    plan = PlanShape(10, 10, 4, "cover", residual=True).draw(0)
    assert plan.first_order == range(10)
    assert plan.sub_chains == (range(0, 2), range(2, 6), range(6, 10))
    plan = PlanShape(10, 10, 4, (2, 5), residual=True).draw(0)
    assert plan.sub_chains == (range(2, 6),)
    assert plan.zeroth_order == (0, 1, 6, 7, 8, 9)
    with pytest.raises(ValueError, match="a surrogate needs its gradient through every step"):
        PlanShape(10, 3, 0, residual=True)


def chi_square(found: Counter, expected: dict) -> float:
    assert set(found) <= set(expected)
    return sum((found[place] - count) ** 2 / count for place, count in expected.items())


def test_the_place_is_uniform_over_its_range() -> None:
    """Chi-square over 4 places, 4,000 draws: 16.3 is passed by chance once in a thousand seeds."""
    shape = PlanShape(10, 1, 3, position=(2, 7))
    starts = Counter(shape.draw(0, step).sub_chains[0].start for step in range(4000))
    assert chi_square(starts, dict.fromkeys((2, 3, 4, 5), 1000)) < 16.3


def test_arrangements_of_several_sub_chains_are_equally_likely() -> None:
    """Two blocks of 2 in 6 steps: 6 arrangements; chi-square 20.5 is passed once in a thousand seeds."""
    shape = PlanShape(7, 1, 2, sub_chain_count=2)
    found = Counter(tuple(block.start for block in shape.draw(0, step).sub_chains) for step in range(6000))
    pairs = [(a, b) for a in range(5) for b in range(a + 2, 5)]
    assert len(pairs) == 6
    assert chi_square(found, dict.fromkeys(pairs, 1000)) < 20.5


def test_an_important_place_is_drawn_by_its_weight() -> None:
    """Chi-square over 3 places, 4,000 draws: 13.8 is passed by chance once in a thousand seeds."""
    shape = PlanShape(6, 1, 3, "importance")
    weights = [0.5, 0.3, 0.2, 9.0, 9.0, 9.0]  # the sub-chain cannot start at the last three
    starts = Counter(shape.draw(0, step, position_weights=weights).sub_chains[0].start for step in range(4000))
    assert chi_square(starts, {0: 2000, 1: 1200, 2: 800}) < 13.8


def test_the_law_of_the_place_is_the_softmax_of_the_norms() -> None:
    weights = softmax_of_norms([3.0, None, 1.0])  # in units of their mean, 2: 1.5, 1, .5
    powers = [math.exp(value) for value in (1.5, 1.0, 0.5)]
    assert weights == pytest.approx([power / sum(powers) for power in powers])
    assert softmax_of_norms([None, None]) == [1.0, 1.0]


@pytest.mark.parametrize("least", [1, 3, 6])
def test_russian_roulette_divides_by_the_probability_of_reaching_a_step(least: int) -> None:
    """The mean over draws of each step's weight, 0 where it is not reached, is 1: to four standard errors."""
    shape = PlanShape(6, least, 0, rest="none", truncation="russian_roulette")
    total, squares, count = [0.0] * 6, [0.0] * 6, 6000
    for draw in range(count):
        plan = shape.draw(0, draw)
        assert plan.step_weights is not None
        for k, weight in zip(plan.first_order, plan.step_weights, strict=True):
            total[k] += weight / count
            squares[k] += weight**2 / count
    for mean, square in zip(total, squares, strict=True):
        assert abs(mean - 1) <= 4 * math.sqrt(max(square - mean**2, 0) / count) + 1e-12
    assert total[6 - least :] == pytest.approx([1.0] * least)
    assert not shape.biased


def test_chunks_spread_a_random_depth_evenly() -> None:
    """Eight chunks of an update reach 7 of 10 depths or more; the mean over updates is the law's, 5.5 +- .05."""
    shape = PlanShape(10, 1, 0, rest="none", truncation="random")
    depths = [[len(shape.draw(0, step, chunk=c).first_order) for c in range(8)] for step in range(200)]
    assert all(len(set(row)) >= 7 for row in depths)
    assert abs(sum(map(sum, depths)) / 1600 - 5.5) < 0.1
    assert shape.biased


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 0), r"`first_order_steps` is 11; allowed: 0 to `steps` \(10\)"),
        ((10, 3, 8), r"sub-chain of 8 steps does not fit in steps 0 to 6 .*allowed: 0 to 7; lower"),
        ((10, 3, 3, (6, 9)), r"does not fit in steps 6 to 6"),
        ((10, 3, 4, "uniform", "none", 2), r"2 sub-chains of 4 steps does not fit .*allowed: 0 to 3"),
        ((10, 3, 2, "importance", "none", 2), r"'importance' draws one sub-chain, found `sub_chain_count` 2"),
        ((10, 3, 2, "cover", "none", 2), r"'cover' makes as many sub-chains as it needs, found `sub_chain_count` 2"),
        ((10, 3, 0, "uniform", "half_order", 1, "random"), r"gives every step to first order"),
        ((10, 0, 0, "uniform", "none", 1, "russian_roulette"), r"at least 1 step, found `first_order_steps` 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanShape(*arguments)


def test_half_order_on_a_silent_step_is_refused() -> None:
    PlanShape(6, 0, 2).check_noise(toy_schedule())
    for shape in (PlanShape(6, 1, 2), PlanShape(6, 1, 0, rest="half_order"), PlanShape(6, 1, 2, "cover")):
        with pytest.raises(ValueError, match="adds no noise"):
            shape.check_noise(toy_schedule(eta=0))
    PlanShape(6, 1, 0).check_noise(toy_schedule(eta=0))
