"""A process among those that share every update."""

from __future__ import annotations

from dataclasses import dataclass

from rlr_ray.core.sums import Reduce


@dataclass(frozen=True)
class Process:
    """This process's place among those that share every update."""

    rank: int = 0
    size: int = 1
    reduce: Reduce = lambda value: value
    ran_on: str = "this process"  # for the summary

    @property
    def leads(self) -> bool:
        return self.rank == 0


ALONE = Process()
