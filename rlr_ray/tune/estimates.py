"""Which points of a search fit a memory budget, before anything is launched; learns from what trials then took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import MappingProxyType

from rlr_ray.config import RunConfig
from rlr_ray.engine import Built, Engine
from rlr_ray.errors import UserError
from rlr_ray.lab.plans import NEUTRAL, with_plan
from rlr_ray.lab.probe import Probe, probe
from rlr_ray.lab.subject import subject_of
from rlr_ray.memory import GIB, memory_errors

_DRAWS = 16  # of plans, for the mean cost of those that are drawn at random


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
        return self._probe(run).memory.peak(run.plan_shape, run.estimator.checkpoint_steps) / GIB

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
def measured_parts(run: RunConfig, built: Built = MappingProxyType({})) -> Probe:
    """Memory and seconds of an update's parts, on this process's device."""
    engine = Engine(with_plan(run, NEUTRAL), built)
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
