"""The problems of bench/problems/problems.yaml, whose head says what their keys mean."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlr_ray.config.recipe import overridden, parse_config
from rlr_ray.config.run import RunConfig

FILE = Path(__file__).with_name("problems.yaml")


@dataclass(frozen=True)
class Problem:
    recipe: dict[str, Any]
    score: str
    judge: str
    ways: dict[str, list[str]]
    cost: int = 24_000

    def config(self, way: str, overrides: Sequence[str]) -> RunConfig:
        """Of a run in one process, which leaves no more than its tables, summary and pictures."""
        fixed = ["name=run", "cluster=none", "loggers=[parquet]"]
        values = overridden(copy.deepcopy(self.recipe), [*fixed, *self.ways[way], *overrides])
        return parse_config(values)


@functools.cache
def problems() -> dict[str, Problem]:
    return {name: Problem(**keys) for name, keys in yaml.safe_load(FILE.read_text("utf-8")).items()}
