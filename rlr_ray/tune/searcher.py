"""Draws a search's points, and launches only those that fit."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray import cloudpickle as ray_pickle
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rlr_ray.config.tune import Distribution, TuneConfig
from rlr_ray.errors import UserError
from rlr_ray.tune.points import Point, Points
from rlr_ray.tune.trial import over_budget, run_of

_MORE = 1.01  # than what it got at its peak is what a run asked for that was refused
_PATIENCE = 20  # with a searcher that draws what it has drawn before
_ATTEMPTS = 100  # to draw a point that fits, then the space is taken to hold no further one


class FittingSearch(Searcher):
    """Optuna's points for one budget, without those that cannot fit it or whose keys do not go together.

    These are written to `filtered` (a line of JSON each) and never launched. What trials of smaller budgets earned
    (`earlier`: point and reward) is known from the start: a budget says what fits, not what it earns.
    """

    def __init__(
        self,
        config: TuneConfig,
        points: Points,
        budget_gib: float,
        filtered: Path,
        earlier: Sequence[tuple[Point, float]] = (),
    ):
        seed = config.seed + len(earlier)  # so that a smaller budget's draws are not repeated
        self.inner = Grid(config.space) if config.searcher == "grid" else _optuna(config, seed)
        super().__init__(metric=self.inner.metric, mode=self.inner.mode)
        self.config, self.points, self.budget_gib, self.filtered = config, points, budget_gib, filtered
        self.launched: dict[str, tuple[str | None, dict[str, Any]]] = {}  # by trial: its draw, and what it was given
        self.drawn = 0
        self.seen: set[str] = set()
        for point, reward in earlier:
            self.seen.add(_text(point))
            if config.searcher == "tpe":  # the others don't look back, or look at memory too
                self.inner.add_evaluated_point(point, reward)

    def suggest(self, trial_id: str) -> Any:
        """What Ray Tune gives to a trial as its config."""
        for attempt in range(sys.maxsize if self.config.searcher == "grid" else _ATTEMPTS):
            if len(self.launched) >= self.config.trials:
                break
            draw, point = self._draw(attempt)
            if point is None:
                break
            launch = self._launch(point)
            if launch is not None:
                self.launched[trial_id] = draw, launch
                return {"launch": launch}
            self._tell(draw, point, None)
        return Searcher.FINISHED

    def _draw(self, attempt: int) -> tuple[str | None, Point | None]:
        """A point, and its name if it is Optuna's: that draws what it likes best again and again in a finite space."""
        if attempt >= _PATIENCE and all("choice" in distribution for distribution in self.config.space.values()):
            return None, next((point for point in grid(self.config.space) if _text(point) not in self.seen), None)
        self.drawn += 1
        draw = f"draw {self.drawn}"
        return draw, self.inner.suggest(draw)

    def _launch(self, point: Point) -> dict[str, Any] | None:
        """What a trial of the point is given; None if it was drawn before, or does not fit."""
        text = _text(point)
        if text in self.seen:
            return None
        self.seen.add(text)
        # by what it is: if an interruption leaves a draw unknown, the next one cannot have its folder
        name = f"{self.budget_gib:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        launch: dict[str, Any] = {"point": point, "folder": str(Path.cwd()), "evaluations": self.config.evaluations}
        try:
            launch["run"] = self.points.recipe(point, self.budget_gib, name)
            peak = self.points.estimates.peak_gib(run_of(launch))
        except UserError as error:
            self._leave_out(point, None, str(error))
            return None
        if peak > self.budget_gib:
            self._leave_out(point, peak, f"needs {peak:.4g} GiB")
            return None
        return launch | {"predicted_gib": peak}

    def _leave_out(self, point: Point, predicted_gib: float | None, why: str) -> None:
        row = {"point": point, "predicted_gib": predicted_gib, "why": why}
        with self.filtered.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id not in self.launched:  # of a state that was saved before
            return
        draw, launch = self.launched[trial_id]
        self._learn(launch, result)
        if "reward" in result and draw is not None:
            self.inner.on_trial_result(draw, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self.launched:
            return
        draw, launch = self.launched[trial_id]
        over = self._learn(launch, result or {})
        failed = error or over or not result or "reward" not in result
        self._tell(draw, launch["point"], None if failed else result)

    def _tell(self, draw: str | None, point: Point, result: dict[str, Any] | None) -> None:
        """Tell Optuna what came of a point; None if nothing did."""
        if draw is not None:
            self.inner.on_trial_complete(draw, result, error=result is None)
        elif result is not None and self.config.searcher == "tpe":
            self.inner.add_evaluated_point(point, result["reward"])

    def _learn(self, launch: dict[str, Any], result: dict[str, Any]) -> bool:
        """Have the estimates know the trial's peak; True if that was over its budget."""
        run = run_of(launch)
        over = over_budget(run)
        peak = _MORE * over["peak_gib"] if over else result.get("peak_gib")
        if peak is not None:
            self.points.estimates.learn(run, peak)
        return over is not None

    def save(self, checkpoint_path: str) -> None:
        """Into Ray Tune's folder, which is this user's alone (`make_private`), like all that Ray Tune pickles there."""
        Path(checkpoint_path).write_bytes(ray_pickle.dumps(vars(self)))

    def restore(self, checkpoint_path: str) -> None:
        self.__dict__.update(ray_pickle.loads(Path(checkpoint_path).read_bytes()))


def _text(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


class Grid(Searcher):
    """Every point of a space of choices, once."""

    def __init__(self, space: Mapping[str, Distribution]):
        super().__init__(metric="reward", mode="max")
        self.space, self.drawn = space, 0

    def suggest(self, trial_id: str) -> Point | None:
        point = next(itertools.islice(grid(self.space), self.drawn, None), None)
        self.drawn += 1
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass


def _optuna(config: TuneConfig, seed: int) -> OptunaSearch:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = OptunaSearch.convert_search_space({key: domain(distribution) for key, distribution in config.space.items()})
    if config.searcher == "nsga2":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.NSGAIISampler(seed=seed)
        return OptunaSearch(space, metric=["reward", "peak_gib"], mode=["max", "min"], sampler=sampler)
    if config.searcher == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, config.trials // 2))
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    return OptunaSearch(space, metric="reward", mode="max", sampler=sampler)


def domain(distribution: Distribution) -> Any:
    """Ray Tune's distribution of that name."""
    (name, arguments), *_ = distribution.items()
    return tune.choice(arguments) if name == "choice" else getattr(tune, name)(*arguments)


def grid(space: Mapping[str, Distribution]) -> Iterator[Point]:
    """Every point of a space of choices."""
    for values in itertools.product(*(distribution["choice"] for distribution in space.values())):
        yield dict(zip(space, values, strict=True))
