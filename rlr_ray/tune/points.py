"""A point of a search's space as a run."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rlr_ray.config import RunConfig
from rlr_ray.engine import check_reward
from rlr_ray.errors import UserError
from rlr_ray.recipes import parse_config, put
from rlr_ray.tune.config import TuneConfig, base_values
from rlr_ray.tune.estimates import Estimates, cost_of_update

Point = dict[str, Any]  # value by key of the recipe
_COMBINATIONS = 20_000  # at which to look for what must be measured


class Points:
    """Makes runs of equal cost from points."""

    def __init__(self, config: TuneConfig, estimates: Estimates):
        self.config, self.estimates, self.base = config, estimates, base_values(config)

    def prepare(self) -> None:
        """Measure what updates of all points need: every combination of choices, and of the ends of the other keys."""
        self.estimates.prepare(self._corners())

    def _corners(self) -> Iterator[RunConfig]:
        space = self.config.space
        ends = [given["choice"] if "choice" in given else next(iter(given.values()))[:2] for given in space.values()]
        for values in itertools.islice(itertools.product(*ends), _COMBINATIONS):
            with suppress(UserError):  # such a point is left out when it is drawn
                yield self._run(self._values(dict(zip(space, values, strict=True))))

    def run(self, point: Point, budget_gib: float, name: str) -> RunConfig:
        """The run of a point. Raises UserError as `recipe` does."""
        return parse_config(self.recipe(point, budget_gib, name))

    def recipe(self, point: Point, budget_gib: float, name: str) -> dict[str, Any]:
        """The keys of a point's run, in which the point's may be set again, as they may not once presets are filled in.

        Raises UserError if its keys do not go together, or if the cost allows no update.
        """
        values = self._values(point)
        values |= {"name": name, "output_dir": str(self.config.folder / "trials"), "memory_budget_gib": budget_gib}
        updates = self._updates(self._run(values))
        between = math.ceil(updates / self.config.evaluations)
        put(values, "train.iterations", updates)
        put(values, "evaluation.every", between)
        put(values, "train.checkpoint_every", between)  # to stop and to copy at
        return values | {"device": self._run(values).device}

    def _values(self, point: Point) -> dict[str, Any]:
        values = copy.deepcopy(self.base)
        for key, value in point.items():
            put(values, key, value)
        return values

    def _run(self, values: dict[str, Any]) -> RunConfig:
        run = parse_config(values)
        check_reward(run)
        if run.estimator.preset == "auto":
            raise UserError("estimator.preset is 'auto', which chooses a plan; a search is to: name another preset")
        return run.on(self.config.gpus) if run.cluster == "none" else run

    def _updates(self, run: RunConfig) -> int:
        """As many as the cost allows."""
        cost, parts = self.config.cost, self.config.evaluations
        if cost.denoiser_forwards is not None:
            allowed, each, unit = cost.denoiser_forwards, cost_of_update(run), "denoiser forwards"
        else:
            assert cost.seconds is not None
            allowed, each, unit = cost.seconds, self.estimates.seconds(run), "seconds"
        if allowed < parts * each:
            raise UserError(
                f"an update takes {each:.4g} {unit}, so {parts} evaluations with an update before each need "
                f"{parts * each:.4g}; cost has {allowed:g}: raise it, or lower evaluations or train.chains"
            )
        return int(allowed / each)
