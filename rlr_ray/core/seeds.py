"""Randomness by name: every random number is a function of a run's seed and of what it is for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*names: int | str) -> int:
    """A seed for what `names` say, e.g. `seed_of(run_seed, "chain", step, index)`; a non-negative 63-bit integer."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A generator for what `names` say. On the CPU, so that every device and every process draws the same numbers."""
    return torch.Generator().manual_seed(seed_of(*names))


def normal(size: tuple[int, ...], dtype: torch.dtype, *names: int | str) -> Tensor:
    """Standard normal numbers for what `names` say, on the CPU."""
    return torch.randn(size, generator=generator(*names), dtype=dtype)


def permutation(size: int, *names: int | str) -> list[int]:
    """A random order of 0 .. size-1 for what `names` say."""
    return torch.randperm(size, generator=generator(*names)).tolist()


def uniform(*names: int | str) -> float:
    """A uniform number of [0, 1) for what `names` say."""
    return float(torch.rand((), generator=generator(*names), dtype=torch.float64))


def chain_noise(seed: int, steps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A chain's start [C, H, W] and its T noises [T, C, H, W].

    Drawn as a diffusers pipeline draws them from `generator=torch.Generator().manual_seed(seed)`, so that the pipeline
    makes the same picture.
    """
    source = torch.Generator().manual_seed(seed)
    start, *noise = [torch.randn(shape, generator=source) for _ in range(steps + 1)]
    return start, torch.stack(noise)


def chains_noise(seeds: Sequence[int], steps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Starts [B, C, H, W] and noises [T, B, C, H, W] of chains, each as `chain_noise`."""
    starts, noises = zip(*(chain_noise(seed, steps, shape) for seed in seeds), strict=True)
    return torch.stack(starts), torch.stack(noises, dim=1)


def generator_checksum() -> float:
    """Equal in two processes whose generators draw the same numbers."""
    return float(normal((1024,), torch.float64, "checksum").sum())
