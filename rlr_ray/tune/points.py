"""A point of a search's space as a run."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from rlr_ray.config.checks import check_first_order
from rlr_ray.config.recipe import parse_config, put, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.config.tune import TuneConfig, base_values
from rlr_ray.errors import UserError
from rlr_ray.lab.cost import Probe, probe
from rlr_ray.lab.measure import subject_of
from rlr_ray.lab.plans import NEUTRAL, with_plan
from rlr_ray.train.engine import Engine, RemoteRewards
from rlr_ray.utils.memory import GIB, memory_errors

Point = dict[str, Any]  # value by key of the recipe
_COMBINATIONS = 20_000  # at which to look for what must be measured
_DRAWS = 16  # of plans, for the mean cost of those that are drawn at random


class Points:
    """Makes runs of equal cost from points."""

    def __init__(self, config: TuneConfig, estimates: Estimates):
        self.config, self.estimates, self.base = config, estimates, base_values(config)

    def prepare(self) -> None:
        """Measure what updates of all points need: every combination of choices, and of the ends of the other keys."""
        self.estimates.prepare(self._corners())

    def _corners(self) -> Iterator[RunConfig]:
        space = self.config.space
        ends = [ends.get("choice") or next(iter(ends.values()))[:2] for ends in space.values()]
        for values in itertools.islice(itertools.product(*ends), _COMBINATIONS):
            with suppress(UserError):  # such a point is left out when it is drawn
                yield self._run(self._values(dict(zip(space, values, strict=True))))

    def run(self, point: Point, budget_gib: float, name: str) -> RunConfig:
        """The run of a point. Raises UserError as `recipe` does."""
        return self._run(self.recipe(point, budget_gib, name))

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
        run = resolve(parse_config(values))
        check_first_order(run)
        if run.chooses_plan:
            raise UserError("estimator.preset is 'measure', which chooses a plan; a search is to: name another preset")
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


class Estimates:
    """Peaks and seconds of runs, from the parts of one update, measured once for all runs that share them."""

    def __init__(self, measure: Callable[[RunConfig], Probe]):
        self.measure = measure
        self.probes: dict[str, Probe] = {}
        self.refused: dict[str, str] = {}  # why parts could not be measured
        self.factors: dict[str, float] = {}  # the most that a peak was above its prediction, and 1 at the least

    def peak_gib(self, run: RunConfig) -> float:
        """Predicted peak of an update."""
        return self._predicted(run) * self.factors.get(_parts_of(run), 1.0)

    def seconds(self, run: RunConfig) -> float:
        """Predicted seconds of an update in one process."""
        plans = [run.plan_shape.draw(run.seed, draw) for draw in range(_DRAWS)]
        return self._probe(run).update_seconds(run, plans)

    def learn(self, run: RunConfig, peak_gib: float) -> None:
        """Take into account what a run took, or asked for before it was refused."""
        parts = _parts_of(run)
        self.factors[parts] = max(self.factors.get(parts, 1.0), peak_gib / self._predicted(run))

    def _predicted(self, run: RunConfig) -> float:
        return self._probe(run).memory.peak(run.plan_shape, run.estimator.checkpointed) / GIB

    def prepare(self, runs: Iterable[RunConfig]) -> None:
        """Measure the parts of these runs, and none from then on: a trial may hold all that measuring would need."""
        for run in runs:
            with suppress(UserError):  # which is kept for whoever asks for that run
                self._probe(run)
        self.measure = _too_late

    def _probe(self, run: RunConfig) -> Probe:
        parts = _parts_of(run)
        if parts in self.refused:
            raise UserError(self.refused[parts])
        if parts not in self.probes:
            try:
                self.probes[parts] = self.measure(run)
            except UserError as error:
                self.refused[parts] = str(error)
                raise
        return self.probes[parts]


def _too_late(run: RunConfig) -> Probe:
    raise UserError(
        "what an update of this point needs was not measured before the search began; give keys that change the "
        "model, adapter, sampler, reward or chunks as `choice`"
    )


@memory_errors()
def measured_parts(run: RunConfig, remote: RemoteRewards = MappingProxyType({})) -> Probe:
    """Memory and seconds of an update's parts, on this process's device."""
    engine = Engine(with_plan(run, NEUTRAL), remote)
    return probe(engine, subject_of(engine, engine.model.initial_theta), differentiable=run.differentiable or run.mixed)


def _parts_of(run: RunConfig) -> str:
    """All that the parts of an update depend on: not the plan, which only says how many there are of each."""
    chunks = {"chains": run.train.chains, "chunk": run.train.chunk_size, "pairs": run.estimator.zeroth_order.chunk_size}
    whole = run.model_dump(mode="json", include={"model", "adapter", "sampler", "rewards", "device"})
    return json.dumps(whole | chunks, sort_keys=True)


def cost_of_update(run: RunConfig) -> float:
    """Denoiser forwards, a backward as two; the mean of plans that are drawn at random."""
    chunks = run.train.chains // run.train.chunk_size
    costs = [run.cost([run.plan_shape.draw(run.seed, d, chunk=c) for c in range(chunks)]) for d in range(_DRAWS)]
    return sum(forwards + 2 * backwards for forwards, backwards in costs) / _DRAWS
