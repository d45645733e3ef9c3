"""Agreement of the expectations of two kinds of estimates: cosine and length, free of the estimates' own noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Agreement of estimates' expectation with a reference's; nan where noise leaves no length."""

    cosine: float
    cosine_se: float
    length: float  # as a multiple of the reference's
    length_se: float

    def __str__(self) -> str:
        if not math.isfinite(self.cosine_se):
            return "too noisy"
        return f"cosine {self.cosine:.2f} ± {self.cosine_se:.2f}, length {self.length:.2f} ± {self.length_se:.2f}"


def agreement(estimates: Tensor, reference: Tensor) -> Agreement:  # [n, P], [n, P]: a row a batch of chains
    """Cosine and relative length of `E estimate` beside `E reference`, from n >= 3 independent batches.

    Inner products of the two means are taken over pairs of different batches, so neither's noise adds to a norm nor,
    where both come from the same chains, to their product; the cosine may therefore exceed 1 by chance. Standard errors
    by leaving out one batch at a time (the jackknife). With few or noisy batches the squared norms may not be positive:
    then all is nan.
    """
    a, b = estimates.double(), reference.double()
    ab, aa, bb = (_without_each(left @ right.T) for left, right in ((a, b), (a, a), (b, b)))  # each [n + 1]
    cosines, lengths = ab / (aa.sqrt() * bb.sqrt()), aa.sqrt() / bb.sqrt()
    return Agreement(float(cosines[0]), _spread(cosines[1:]), float(lengths[0]), _spread(lengths[1:]))


def relative_bias(estimates: Tensor, reference: Tensor) -> tuple[float, float]:  # [n, P], [n, P]
    """Mean and standard error of (estimate - exact) . g / |g|^2, paired batch by batch.

    g is the exact ones' mean over the other half of the batches, and |g|^2 the product of the halves' means: a noisy g
    would favour its own noise. nan if the halves do not agree at all.
    """
    differences = (estimates - reference).double()
    halves = [reference[0::2].double().mean(0), reference[1::2].double().mean(0)]
    square = float(halves[0] @ halves[1])
    if square <= 0:
        return math.nan, math.nan
    along = torch.cat([differences[0::2] @ halves[1], differences[1::2] @ halves[0]]) / square
    return float(along.mean()), float(along.std()) / math.sqrt(len(along))


def square_of_mean(rows: Tensor) -> float:  # [n, P]
    """|E row|^2, free of noise: the mean product of different batches' rows; may be negative."""
    return float(_without_each(rows.double() @ rows.double().T)[0])


def _without_each(gram: Tensor) -> Tensor:  # [n, n] -> [n + 1]
    """Mean over pairs of different batches: of all, and without each; at most 0 becomes nan in a root."""
    n, diagonal = len(gram), gram.diagonal()
    total = gram.sum() - diagonal.sum()
    without = total - gram.sum(0) - gram.sum(1) + 2 * diagonal
    return torch.cat([total[None] / (n * (n - 1)), without / ((n - 1) * (n - 2))])


def _spread(left_out: Tensor) -> float:  # [n]
    """The jackknife's standard error."""
    n = len(left_out)
    return float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())
