"""Cosine and length of expectations against known ones, noise and shared chains notwithstanding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlr_ray.lab.agreement import agreement


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:  # 2 [n, 50]
    """Estimates and references of cosine .8 and length 2, whose noise is theirs in common and 25 times as large."""
    source = torch.Generator().manual_seed(seed)
    noise = 5 / 50**0.5 * torch.randn(n, 50, generator=source, dtype=torch.float64)
    reference, estimate = torch.zeros(2, 50, dtype=torch.float64)
    reference[0] = 1
    estimate[:2] = 2 * torch.tensor([0.8, 0.6])
    return estimate + noise, reference + noise


def test_noise_in_common_adds_nothing_and_the_errors_are_those_of_repetitions() -> None:
    """100 repetitions of 200 batches: means to 4 standard errors, stated errors to a fifth (and some chance)."""
    told = [agreement(*rows(200, seed)) for seed in range(100)]
    for of, truth in (("cosine", 0.8), ("length", 2.0)):
        values = torch.tensor([getattr(one, of) for one in told])
        stated = torch.tensor([getattr(one, f"{of}_se") for one in told])
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / 10 + 0.01 * truth
        assert float(stated.mean()) == pytest.approx(float(values.std()), rel=0.3)


def test_a_reference_of_noise_alone_says_nothing() -> None:
    source = torch.Generator().manual_seed(1)
    noise = torch.randn(20, 50, generator=source)
    noise = noise - noise.mean(0)  # pairs of batches then have a negative product
    told = agreement(noise, noise)
    assert math.isnan(told.cosine) and str(told) == "too noisy"
