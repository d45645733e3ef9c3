"""Searches as YAML: what loads, and what is refused saying why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlr_ray.config.recipe import parse_config
from rlr_ray.config.tune import base_values, load_tune_config
from rlr_ray.errors import UserError
from rlr_ray.lab.cost import Line, MemoryModel, Probe
from rlr_ray.tune.points import Estimates, Points
from rlr_ray.tune.searcher import FittingSearch
from tests.runs import RECIPE

SECONDS = {"forward": 0.1, "backward": 0.2, "rollout": 1.0}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "tune_configs").glob("*.yaml")), ids=lambda file: file.name)
def test_ready_searches_load_and_their_points_are_runs(file: Path, tmp_path: Path) -> None:
    """Forty points at random of each, as a search draws them before it measures anything."""
    config = load_tune_config(str(file), ["searcher=random", "trials=40"])
    light = Estimates(lambda run: Probe(MemoryModel(0, 0, Line(0, 0), Line(0, 0), Line(0, 0), 0), SECONDS))
    search = FittingSearch(config, Points(config, light), max(config.budgets_gib), tmp_path / "filtered.jsonl")
    runs = [parse_config(search.suggest(str(number))["launch"]["run"]) for number in range(40)]
    assert all(run.train.iterations >= config.evaluations for run in runs)
    assert not (tmp_path / "filtered.jsonl").exists()


def written(folder: Path, base: dict[str, Any] = RECIPE, **changes: Any) -> str:
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    search: dict[str, Any] = {
        "name": "searched",
        "base": "base.yaml",
        "space": {"estimator.sub_chain.length": {"choice": [1, 2]}},
        "budgets_gib": [1.0],
        "cost": {"denoiser_forwards": 1000},
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(search | changes))
    return str(folder / "search.yaml")


def test_the_base_is_found_from_the_searchs_folder_and_its_keys_are_set(tmp_path: Path) -> None:
    config = load_tune_config(written(tmp_path, set={"train.chains": 16}), ["trials=3"])
    assert config.trials == 3
    assert parse_config(base_values(config)).train.chains == 16


def test_a_recipes_key_is_set_with_its_dots_and_nothing_beside_it_is_lost(tmp_path: Path) -> None:
    """On the command line as in the file: `set.KEY=value` and `space.KEY={...}`, new keys and ones that are there."""
    file = written(tmp_path, set={"train.chains": 16, "train.chunk_size": 4}, space={"seed": {"choice": [0, 1]}})
    label = 'reward."options"'
    overrides = [
        "set.train.chains=80",
        "set.train.learning_rate=1.5",
        f"set.{label}={{}}",
        "cost.denoiser_forwards=7e4",
    ]
    overrides += ["space.train.betas={choice: [[0.9, 0.99]]}", "space.seed={choice: [2]}", "scheduler.grace=2"]
    config = load_tune_config(file, overrides)
    assert config.set == {"train.chains": 80, "train.chunk_size": 4, "train.learning_rate": 1.5, label: {}}
    assert config.space == {"seed": {"choice": [2]}, "train.betas": {"choice": [[0.9, 0.99]]}}
    assert config.cost.denoiser_forwards == 7e4 and config.scheduler.grace == 2
    train, base = parse_config(base_values(config)).train, parse_config(RECIPE).train
    changed = {"chains": 80, "chunk_size": 4, "learning_rate": 1.5}
    assert train == base.model_copy(update=changed)


def test_what_yaml_takes_for_no_number_is_one(tmp_path: Path) -> None:
    overrides = ["space.train.learning_rate={loguniform: [1e-4, 1e-2]}"]
    space = load_tune_config(written(tmp_path, space={"seed": {"choice": [0]}}), overrides).space
    assert space["train.learning_rate"] == {"loguniform": [1e-4, 1e-2]}


def test_a_grid_is_tried_whole_unless_trials_are_set(tmp_path: Path) -> None:
    space = {"seed": {"choice": list(range(12))}, "train.chains": {"choice": [8, 16]}}
    assert load_tune_config(written(tmp_path, space=space, searcher="grid"), []).trials == 24
    assert load_tune_config(written(tmp_path, space=space, searcher="grid"), ["trials=5"]).trials == 5
    assert load_tune_config(written(tmp_path, space=space), []).trials == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"train.learning_rate": {"normal": [0, 1]}}}, "allowed: one of choice, uniform"),
        ({"space": {"train.learning_rate": {"loguniform": [0, 1]}}}, "allowed: numbers above 0"),
        ({"space": {"train.learning_rate": {"uniform": [2, 1]}}}, "lower before upper"),
        ({"space": {"train.learning_rate": {"quniform": [0, 1]}}}, "allowed: 3 numbers"),
        ({"space": {"train.learning_rate": {"quniform": [0, 1, 0]}}}, "a step above 0 that divides both bounds"),
        ({"space": {"train.learning_rate": {"quniform": [0, 1, 0.3]}}}, "a step above 0 that divides both bounds"),
        ({"space": {"train.chains": {"randint": [1.5, 3]}}}, "allowed: 2 whole numbers"),
        ({"space": {"train.learning_rate": {"choice": []}}}, "allowed: a list"),
        ({"space": {"train.learning_rate": 3}}, "allowed: one of choice, uniform"),
        ({"space": {}}, "space"),
        ({"space": {"train.iterations": {"choice": [1]}}}, "cannot be searched over, a search sets it"),
        ({"space": {"cluster.worker.gpus": {"choice": [1]}}}, "cannot be searched over"),
        ({"cost": {}}, "one of denoiser_forwards and seconds"),
        ({"cost": {"seconds": 1, "denoiser_forwards": 1}}, "one of denoiser_forwards and seconds"),
        ({"budgets_gib": [0]}, "budgets_gib"),
        ({"scheduler": {"name": "bandit"}}, "scheduler.name"),
        ({"searcher": "grid", "space": {"train.learning_rate": {"uniform": [1, 2]}}}, "`choice` for every key"),
        ({"budget": [1]}, "budget: no such key; allowed here: base, budgets_gib"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tune_config(written(tmp_path, **changes), [])
    assert words in str(caught.value)
