"""Spaces of points as Ray Tune's distributions, and as all their points."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ray import tune

from rlr_ray.tune.config import Distribution
from rlr_ray.tune.points import Point


def domain(given: Distribution) -> Any:
    """Ray Tune's distribution of that name."""
    (name, arguments), *_ = given.items()
    return tune.choice(arguments) if name == "choice" else getattr(tune, name)(*arguments)


def grid(space: Mapping[str, Distribution]) -> Iterator[Point]:
    """Every point of a space of choices."""
    for values in itertools.product(*(given["choice"] for given in space.values())):
        yield dict(zip(space, values, strict=True))
