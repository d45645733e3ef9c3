"""The memory model's sums, and the paper's closed form against the paper's own numbers."""

from __future__ import annotations

import pytest

from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.lab.cost import Line, MemoryModel, closed_form_length

MODEL = MemoryModel(100, 5, Line(20, 7), Line(12, 1), Line(10, 7), 30)


@pytest.mark.parametrize(
    ("shape", "checkpoint_steps", "peak"),
    [
        (PlanShape(10, 3, 0, rest="none"), False, 100 + 20 + 2 * 7),
        (PlanShape(10, 3, 0, rest="none"), True, 100 + 12 + 2),
        (PlanShape(10, 1, 5, rest="none"), True, 100 + 10 + 4 * 7),
        (PlanShape(10, 1, 2), True, 130),
        (PlanShape(10, 0, 0, rest="half_order"), True, 110),
        (PlanShape(10, 1, 0, rest="none", truncation="russian_roulette"), False, 100 + 20 + 9 * 7),
    ],
)
def test_the_worst_part_decides(shape: PlanShape, checkpoint_steps: bool, peak: float) -> None:
    assert MODEL.peak(shape, checkpoint_steps) == peak


@pytest.mark.parametrize(("budget", "length"), [(30, 2), (35, 2), (12, 0), (60, 6), (1000, 24), (1, 0)])
def test_the_papers_rule_with_the_papers_numbers(budget: float, length: int) -> None:
    """B_h = 8 GB, B_z = 0.24 GB, T = 50, V_h << V_z: at 30 GB h = 2; with memory to spare T / 2 - 1 = 24."""
    assert closed_form_length(budget, 8, 0.24, 0.0, 1.0, 50) == length


def test_where_the_papers_premises_fail_their_terms_do_not_bind() -> None:
    assert closed_form_length(100, 8, 0.24, 2.0, 1.0, 10) == 9  # half order has more variance: h up to T - 1
    assert closed_form_length(0.0, 0.1, 0.24, 0.0, 1.0, 10) == 4  # zeroth order takes more memory: T / 2 - 1
