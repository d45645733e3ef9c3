"""What the planner goes by: the law of alignment, cosines as far as they are sure, and the words for them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlr_ray.lab.agreement import Agreement
from rlr_ray.lab.judge import LEAST_COSINE, judge, signal_of, sure_cosine, trust_words
from rlr_ray.lab.options import Option
from rlr_ray.lab.report import surest
from rlr_ray.lab.toy_cases import toy_cases
from tests.lab.test_certificate import TRUTH


def option(told: Agreement | None, **keys: float) -> Option:
    facts = {"variance": 100.0, "variance_se": 1.0, "signal": 4.0, "cost": 10.0, "peak_gib": 1.0, "seconds": 1.0}
    bias = {"relative_bias": 0.0, "relative_bias_se": 0.0}
    return Option("o", {}, "plan", told is None, **facts | keys | bias, agreement=told, beside_clipped=None, fits=True)


def test_the_price_is_what_equal_alignment_costs() -> None:
    """Means of n rows of a known direction, whose cosine with g falls as the law says: to 1 % over 20,000 draws."""
    g, mean, deviation, n = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.2, 0.9, 0, 0]), 6.0, 2
    draws = mean + deviation / n**0.5 * torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    along = float(draws.mean(0) @ g) / float(draws.square().sum(1).mean()) ** 0.5
    told = Agreement(0.8, 0.0, 1.5, 0.0)
    priced = option(told, variance=4 * deviation**2, signal=float(mean.square().sum()), cost=1.0)
    law = 0.8 / math.sqrt(1 + priced.noise_scale / n)
    assert along == pytest.approx(law, rel=0.05)
    assert priced.price == pytest.approx(n / law**2 - n / 0.8**2)  # forwards where noise dominates


def test_a_biased_plan_is_chosen_only_if_its_direction_is_sure() -> None:
    assert option(None).price == 250 and option(None).can_be_chosen
    sure, doubtful = option(Agreement(0.9, 0.1, 1, 0.1)), option(Agreement(0.9, 0.5, 1, 0.5))
    assert sure.can_be_chosen and sure.price == pytest.approx(250 / 0.8**2)
    assert not doubtful.can_be_chosen and not option(Agreement(math.nan, math.nan, 1, 1)).can_be_chosen
    assert sure_cosine(Agreement(1.4, 0.1, 1, 0.1)) == pytest.approx(0.9)  # by chance above 1


@pytest.mark.parametrize(
    ("cosine", "error", "said"),
    [
        (0.95, 0.05, "far:"),
        (0.7, 0.1, "some way"),
        (0.3, 0.05, "hardly"),
        (0.6, 0.2, "not sure"),
        (0.9, 0.4, "noise hides"),
    ],
)
def test_the_words_follow_from_cosine_and_error(cosine: float, error: float, said: str) -> None:
    words = trust_words("the forward term", Agreement(cosine, error, 1.0, 0.1), "branches")
    assert said in words and f"{cosine:.2f} ± {error:.2f}" in words and "branches" in words


def test_the_words_go_by_what_is_surest() -> None:
    """Of an unbiased reference and clipped backpropagation."""
    noisy, sure, unknown = Agreement(0.9, 0.4, 1, 1), Agreement(0.8, 0.1, 1, 1), Agreement(math.nan, math.nan, 1, 1)
    for told, beside, expected in ((noisy, sure, "clipped"), (sure, noisy, "branches"), (unknown, sure, "clipped")):
        one = replace(option(told), beside_clipped=beside)
        assert surest(one, "branches") == (sure, "clipped backpropagation" if expected == "clipped" else "branches")
    assert surest(option(noisy), "branches") == (noisy, "branches")


def test_the_forward_term_is_judged_by_its_own_expectation() -> None:
    """On the toy chain, where it is short: the docs' cosine; and noise is over its own length, not the gradient's."""
    (case,) = [case for case in toy_cases() if case.candidate.name == "forward term, uniform"]
    reference = TRUTH.steps().sum(1)
    judged = judge(case.subject, case.candidate, reference)
    assert abs(judged.agreement.cosine - 0.81) < 4 * judged.agreement.cosine_se < 0.12
    assert judged.signal / signal_of(reference) == pytest.approx(judged.agreement.length**2, rel=1e-6)
    assert sure_cosine(judged.agreement) > LEAST_COSINE
