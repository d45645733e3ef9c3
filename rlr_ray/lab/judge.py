"""Judging a gradient as it will be used: noise scale x cost, and its direction by an unbiased reference.

n batches of B chains, P trained numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.lab.agreement import Agreement, agreement, square_of_mean
from rlr_ray.lab.measure import Candidate, Measurement, Subject, sample, summarise

LEAST_COSINE = 0.5  # that a biased gradient must surely have


@dataclass(frozen=True)
class Judged:
    """A candidate's statistics, and how its expectation agrees with the reference's."""

    measured: Measurement
    signal: float  # |E estimate|^2
    agreement: Agreement
    rows: Tensor  # [n, P] the estimates


def judge(subject: Subject, candidate: Candidate, reference: Tensor) -> Judged:  # [n, P]
    """By the product's own code on the reference's batches; chains are clipped by their batch's own median.

    The reference's rows are its estimates of the same batches: exact gradients, or branches.
    """
    samples = sample(subject, candidate, len(reference))
    measured = summarise(candidate, samples, reference, len(subject.groups))
    rows = torch.stack([measured.weights[name] * row for name, row in samples.terms.items()]).sum(0)
    return Judged(measured, signal_of(rows), agreement(rows, reference), rows)


def signal_of(rows: Tensor) -> float:  # [n, P]
    """|E row|^2 over pairs of batches; where noise hides it, that of the mean, which is too large."""
    square = square_of_mean(rows)
    return square if square > 0 else float(rows.double().mean(0).square().sum())


def sure_cosine(measured: Agreement) -> float:
    """A standard error below the cosine; 0 where that is not known."""
    return max(min(measured.cosine, 1.0) - measured.cosine_se, 0.0) if math.isfinite(measured.cosine_se) else 0.0


def trust_words(name: str, measured: Agreement, reference: str) -> str:
    """A sentence on how far a biased gradient can be trusted on this problem."""
    sure = sure_cosine(measured)
    if not math.isfinite(measured.cosine_se) or measured.cosine_se > 0.3:
        verdict = "not known, noise hides it; measure more batches (--batches)"
    elif measured.cosine + measured.cosine_se < LEAST_COSINE:
        verdict = "hardly: it climbs something else as well; prefer an unbiased plan, or a surrogate that is trusted"
    elif sure >= 0.8:
        verdict = "far: it points along the gradient here, at the start of a run"
    elif sure >= LEAST_COSINE:
        verdict = "some way: most of it is along the gradient; watch the held-out reward"
    else:
        verdict = "not sure: measure more batches (--batches)"
    return f"how far {name} can be trusted here: {verdict} ({measured}, beside {reference})"
