"""Which points are drawn, told and left out; no Ray runs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from rlr_ray.config.recipe import parse_config
from rlr_ray.config.tune import load_tune_config
from rlr_ray.lab.cost import Probe
from rlr_ray.tune.points import Estimates, Points
from rlr_ray.tune.search import _within_bounds
from rlr_ray.tune.searcher import FittingSearch
from tests.config.test_tune import written
from tests.tune.test_points import KNOWN, MODEL, SECONDS, H

SCALE = "estimator.zeroth_order.scale"
TOP = math.log10(0.03)


def searcher(folder: Path, budget_gib: float = 4.0, earlier: Any = (), **changes: Any) -> FittingSearch:
    config = load_tune_config(written(folder, **changes), [])
    return FittingSearch(config, Points(config, KNOWN), budget_gib, folder / "filtered.jsonl", earlier)


def drawn(search: FittingSearch) -> list[dict[str, Any]]:
    """The points of trials that all stay unanswered."""
    found = iter(lambda: search.suggest(f"t{len(search.launched)}"), FittingSearch.FINISHED)
    return [suggestion["launch"]["point"] for suggestion in found]


def earned(point: dict[str, Any]) -> float:
    return -((math.log10(point[SCALE]) - TOP) ** 2)


def answered(search: FittingSearch, count: int) -> list[dict[str, Any]]:
    """The points of so many further trials, each told before the next is drawn."""
    points = []
    for _ in range(count):
        trial = f"t{len(search.launched)}"
        points.append(search.suggest(trial)["launch"]["point"])
        search.on_trial_complete(trial, {"reward": earned(points[-1])})
    return points


def test_a_grid_launches_every_point_that_fits_and_writes_down_why_the_others_do_not(tmp_path: Path) -> None:
    """A sub-chain of h steps takes h GiB; one of 9 is longer than the 5 steps of the sampler."""
    space = {H: {"choice": [1, 2, 3, 9]}, "seed": {"choice": [0, 1]}}
    search = searcher(tmp_path, 2.5, space=space, searcher="grid", trials=100)
    assert drawn(search) == [{H: length, "seed": seed} for length in (1, 2) for seed in (0, 1)]
    rows = [json.loads(line) for line in (tmp_path / "filtered.jsonl").read_text().splitlines()]
    assert [(row["point"][H], row["predicted_gib"]) for row in rows] == [(3, 3.0), (3, 3.0), (9, None), (9, None)]
    assert rows[0]["why"] == "needs 3 GiB" and "sub-chain" in rows[2]["why"]


def test_points_of_a_smaller_budget_are_not_launched_again(tmp_path: Path) -> None:
    space = {H: {"choice": [1, 2, 3]}}
    for name in ("grid", "random", "tpe"):
        search = searcher(tmp_path, earlier=[({H: 1}, 0.5), ({H: 3}, 0.7)], space=space, searcher=name, trials=100)
        assert drawn(search) == [{H: 2}]


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_finite_space_is_searched_to_its_end(tmp_path: Path, name: str) -> None:
    """Although TPE draws again and again what it likes best."""
    space = {H: {"choice": [1, 2, 3]}, "seed": {"choice": list(range(8))}}
    search, points = searcher(tmp_path, space=space, searcher=name, trials=24), []
    for number in range(24):
        points.append(search.suggest(str(number))["launch"]["point"])
        search.on_trial_complete(str(number), {"reward": -abs(points[-1][H] - 2) - points[-1]["seed"]})
    assert len({json.dumps(point) for point in points}) == 24
    assert search.suggest("one more") == FittingSearch.FINISHED


def test_a_trial_that_was_refused_at_its_budget_keeps_its_like_from_being_launched(tmp_path: Path) -> None:
    """On CUDA the peak that is known is what it got, never more than the budget."""
    search = searcher(tmp_path, 3.0, output_dir=str(tmp_path), space={H: {"choice": [2]}, "seed": {"randint": [0, 9]}})
    run = parse_config(search.suggest("a")["launch"]["run"])
    run.folder.mkdir(parents=True)
    (run.folder / "over_budget.json").write_text('{"peak_gib": 3.0, "words": "no room"}')
    search.on_trial_complete("a", error=True)
    assert search.suggest("b") == FittingSearch.FINISHED
    rows = [json.loads(line) for line in (tmp_path / "filtered.jsonl").read_text().splitlines()]
    assert {row["why"] for row in rows} == {"needs 3.03 GiB"}


def test_a_users_own_reward_is_searched_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of itself is known alike where updates are measured and where points are drawn."""
    module = "from rlr_ray.rewards.digits import Digits\n\n\nclass Own(Digits):\n    differentiable = True\n"
    (tmp_path / "own_reward.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    space = {"reward.name": {"choice": ["own_reward:Own"]}}
    config = load_tune_config(written(tmp_path, space=space, searcher="grid"), [])
    points = Points(config, Estimates(lambda run: Probe(MODEL, SECONDS)))
    points.prepare()
    search = FittingSearch(config, points, 4.0, tmp_path / "filtered.jsonl")
    assert drawn(search) == [{"reward.name": "own_reward:Own"}]


def test_what_smaller_budgets_earned_guides_the_next_draws(tmp_path: Path) -> None:
    """Thirty known points of a parabola: the next ones lie nearer to its top than those a search's own first twelve."""
    space = {SCALE: {"loguniform": [0.0001, 10.0]}}
    grid = [10 ** (-4 + 5 * i / 29) for i in range(30)]
    earlier = [({SCALE: value}, earned({SCALE: value})) for value in grid]

    def distance(points: list[dict[str, Any]]) -> float:
        return statistics.mean(abs(math.log10(point[SCALE]) - TOP) for point in points)

    guided = distance(answered(searcher(tmp_path, earlier=earlier, space=space, trials=12), 12))
    blind = distance(answered(searcher(tmp_path, space=space, trials=12), 12))
    assert guided < 0.5 * blind


def test_a_saved_search_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    space = {SCALE: {"loguniform": [0.001, 1.0]}}
    whole = searcher(tmp_path, space=space, trials=20)
    answered(whole, 12)
    whole.save(str(tmp_path / "state"))
    again = searcher(tmp_path, space=space, trials=20)
    again.restore(str(tmp_path / "state"))
    again.on_trial_result("launched after it was saved", {"reward": 1.0})
    assert drawn(again) == drawn(whole) != []


def test_a_population_stays_within_the_bounds_of_its_space(tmp_path: Path) -> None:
    """The upper one of whole numbers is never drawn."""
    space: Any = {SCALE: {"loguniform": [0.001, 1.0]}, "seed": {"randint": [0, 9]}, H: {"choice": [1, 2]}}
    config = load_tune_config(written(tmp_path, space=space), [])
    for point, expected in (([1.2, 10, 2], [1.0, 8, 2]), ([0.0008, -1, 1], [0.001, 0, 1]), ([0.5, 8, 1],) * 2):
        mutated = _within_bounds(config, {"launch": {"point": dict(zip(space, point, strict=True))}})
        assert list(mutated["launch"]["point"].values()) == expected
