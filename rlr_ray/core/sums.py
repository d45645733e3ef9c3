"""Sums of gradients in little memory, whose bits depend neither on the order of the summands nor on who has which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sum over the processes that share an update

LIMIT = 2.0**30  # of a number's size
_COARSE, _FINE = 2.0**20, 2.0**71  # inverse units of the two integers that hold a number
_MOST = 2**12  # chunks
_BLOCK = 2**18  # numbers worked on at once, so that no conversion takes memory of the order of P


def square_norm(vector: Tensor) -> float:  # [P]
    """In double precision, block by block."""
    return sum(float(part.double().square().sum()) for part in vector.split(_BLOCK))


def reduced(vector: Tensor, reduce: Reduce) -> Tensor:  # [P] -> [P]
    """Sum over the processes, in place and block by block."""
    for part in vector.split(_BLOCK):
        part.copy_(reduce(part))
    return vector


def gathered(local: Mapping[int, Tensor], chunks: int, reduce: Reduce) -> Tensor:  # chunk -> [...]; [chunks, ...]
    """The values of all chunks, in their order, from processes of which each has those of its `local` ones."""
    first = next(iter(local.values()))
    values = first.new_zeros(chunks, *first.shape)  # other processes' chunks stay 0 here
    for c, value in local.items():
        values[c] = value
    return reduce(values)


class ExactMean:
    """Mean of the chunks' gradients [P], each of which is added by whichever process has it.

    A number x is held as the integers `h = round(2^20 x)` and `l = round(2^71 (x - 2^-20 h))`. Sums of integers are
    exact, so any order and any share of the work gives the same bits. Numbers below 2^30 in size are taken, of up to
    4,096 chunks, with an error of at most 2^-72 (2e-22) each; a gradient with a larger number, an infinity or a nan
    makes the mean nan. Memory: 2 P integers of 64 bits, used anew for every mean.
    """

    def __init__(self, like: Tensor, chunks: int, reduce: Reduce = lambda value: value):  # like: [P]
        if chunks > _MOST:
            raise ValueError(f"{chunks} chunks are more than an exact sum takes; allowed: up to {_MOST}")
        self.like, self.reduce = like, reduce
        self.sums = torch.zeros(2, len(like), dtype=torch.int64, device=like.device)
        self.squares = torch.zeros(chunks, dtype=torch.float64, device=like.device)  # norms, of this process's chunks

    def add(self, chunk: int, gradient: Tensor) -> None:  # [P]
        low, high = gradient.aminmax()
        if not (low > -LIMIT and high < LIMIT):  # so is a nan
            self.squares[chunk] = math.nan
            return
        self.squares[chunk] = square_norm(gradient)
        for part, (coarse, fine) in zip(gradient.split(_BLOCK), self._blocks(), strict=True):
            rest = part.to(torch.float64, copy=True)
            rounded = (rest * _COARSE).round_()
            coarse += rounded.long()
            fine += rest.sub_(rounded, alpha=1 / _COARSE).mul_(_FINE).round_().long()

    def take(self, chunks: Sequence[int]) -> tuple[Tensor, float]:  # [P]
        """Mean over these chunks, which processes added since the last time, and the mean of their squared norms."""
        squares = self.reduce(self.squares)[list(chunks)].tolist()
        mean = torch.full_like(self.like, 0.0 if all(map(math.isfinite, squares)) else math.nan)
        for part, sums in zip(mean.split(_BLOCK), self._blocks(), strict=True):
            coarse, fine = self.reduce(sums.contiguous()).double()
            part += (coarse / _COARSE + fine / _FINE) / len(chunks)
            sums.zero_()
        return mean, sum(squares) / len(squares)

    def _blocks(self) -> tuple[Tensor, ...]:  # each [2, block]
        return self.sums.split(_BLOCK, dim=1)
