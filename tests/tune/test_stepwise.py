"""Work taken one report at a time, and given up at one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlr_ray.tune.trial import Stepwise


def test_results_come_one_by_one_and_the_work_waits_in_between() -> None:
    done = []

    def work(report: Callable[[int], None]) -> None:
        for number in range(3):
            done.append(number)
            report(number)

    steps = Stepwise(work)
    assert done == []
    assert (steps.next(), done) == (0, [0])
    assert (steps.next(), done) == (1, [0, 1])
    assert [steps.next(), steps.next()] == [2, None]
    steps.end()


def test_what_the_work_raises_is_raised_after_what_it_reported() -> None:
    def work(report: Callable[[int], None]) -> None:
        report(1)
        raise ValueError("odd")

    steps = Stepwise(work)
    assert steps.next() == 1
    with pytest.raises(ValueError, match="odd"):
        steps.next()
    steps.end()


def test_a_work_that_is_given_up_unwinds_before_end_returns() -> None:
    freed = []

    def work(report: Callable[[int], None]) -> None:
        try:
            report(1)
            freed.append("went on")
        except Exception:
            freed.append("taken for an error")
        finally:
            freed.append("freed")

    steps = Stepwise(work)
    steps.next()
    steps.end()
    assert freed == ["freed"]


def test_a_work_that_never_began_is_not_begun_by_its_end() -> None:
    begun = []
    steps = Stepwise(lambda report: begun.append(1))
    steps.end()
    assert begun == []
