"""Plans: every step has one owner, places are uniform, and what does not fit is refused."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from rlr_ray.core.plan import PlanShape
from tests.toy import toy_schedule


@pytest.mark.parametrize("rest", ["zeroth_order", "half_order", "none"])
def test_every_step_has_at_most_one_owner_and_one_if_unbiased(rest: str) -> None:
    for first, length, seed in itertools.product(range(11), range(11), range(5)):
        if first + length > 10:
            continue
        shape = PlanShape(10, first, length, rest=rest)  # type: ignore[arg-type]
        plan = shape.draw(seed)
        owned = [*plan.first_order, *(k for chain in plan.sub_chains for k in chain), *plan.zeroth_order]
        assert len(owned) == len(set(owned))
        assert (set(owned) == set(range(10))) != shape.biased
        assert bool(plan.zeroth_order) == shape.has_zeroth_order
        assert bool(plan.sub_chains) == shape.has_half_order
        assert plan.forwards() == 10 + sum(map(len, plan.sub_chains))
        assert plan.forwards(checkpoint_steps=True) == plan.forwards() + first


def test_the_place_is_uniform_over_its_range() -> None:
    """Chi-square over 4 places, 4,000 draws: 16.3 is passed by chance once in a thousand seeds."""
    shape = PlanShape(10, 1, 3, place=(2, 7))
    starts = Counter(shape.draw(0, step).sub_chains[0].start for step in range(4000))
    assert set(starts) == {2, 3, 4, 5}
    assert sum((count - 1000) ** 2 / 1000 for count in starts.values()) < 16.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 0), r"first_order_steps is 11; allowed: 0 to sampler.steps \(10\)"),
        ((10, 3, 8), r"sub-chain of 8 steps does not fit in steps 0 to 6 .*allowed: 0 to 7; lower"),
        ((10, 3, 3, (6, 9)), r"does not fit in steps 6 to 6"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanShape(*arguments)


def test_half_order_on_a_silent_step_is_refused() -> None:
    PlanShape(6, 0, 2).check_noise(toy_schedule())
    with pytest.raises(ValueError, match="adds no noise"):
        PlanShape(6, 1, 2).check_noise(toy_schedule(eta=0))
    with pytest.raises(ValueError, match="adds no noise"):
        PlanShape(6, 1, 0, rest="half_order").check_noise(toy_schedule(eta=0))
    PlanShape(6, 1, 0).check_noise(toy_schedule(eta=0))
