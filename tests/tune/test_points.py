"""Points of a space as runs of equal cost, and what is predicted of their memory."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlr_ray.config.run import RunConfig
from rlr_ray.config.tune import load_tune_config
from rlr_ray.errors import UserError
from rlr_ray.lab.cost import Line, MemoryModel, Probe
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from rlr_ray.tune.points import Estimates, Points, cost_of_update, measured_parts
from rlr_ray.tune.trial import run_of
from rlr_ray.utils.memory import GIB, peak_bytes
from tests.config.test_tune import SECONDS, written

# A step of a sub-chain takes 1 GiB, all else is free of charge.
MODEL = MemoryModel(0.0, 0.0, Line(0, 0), Line(0, 0), Line(GIB, GIB), 0.0)
KNOWN = Estimates(lambda run: Probe(MODEL, SECONDS))
H, SCALE = "estimator.sub_chain.length", "estimator.zeroth_order.scale"


def points(folder: Path, **changes: object) -> Points:
    return Points(load_tune_config(written(folder, **changes), []), KNOWN)


def test_every_point_spends_what_the_cost_allows(tmp_path: Path) -> None:
    made = points(tmp_path, evaluations=3, cost={"denoiser_forwards": 2000})
    for length in (1, 2, 3):
        run = made.run({H: length}, 4.0, "a")
        updates, each = run.train.iterations, cost_of_update(run)
        assert updates * each <= 2000 < (updates + 1) * each
        assert run.evaluation.every == run.train.checkpoint_every == math.ceil(updates / 3)


def test_cost_in_seconds_follows_the_measured_parts(tmp_path: Path) -> None:
    made = points(tmp_path, evaluations=1, cost={"seconds": 100})
    run = made.run({H: 2}, 4.0, "a")
    # 2 chunks of 5 forwards, 2 more in the sub-chain, 1 + 2 backwards; and 2 chunks of pairs
    assert KNOWN.seconds(run) == pytest.approx(2 * (7 * 0.1 + 3 * 0.2) + 2 * 1.0)
    assert run.train.iterations == int(100 / KNOWN.seconds(run))


def test_a_points_keys_may_be_set_again(tmp_path: Path) -> None:
    """As a population does; the short forms of the recipe's keys are still what they were."""
    point = {H: 2, "reward.name": "digits"}
    recipe = points(tmp_path).recipe(point, 4.0, "a")
    again = run_of({"run": recipe, "point": point | {H: 1}})
    assert list(again.rewards) == ["digits"] and again.estimator.sub_chain.length == 1
    assert run_of({"run": recipe, "point": point}) == points(tmp_path).run(point, 4.0, "a")


def test_a_trial_uses_a_gpu_only_if_it_has_one(tmp_path: Path) -> None:
    assert points(tmp_path).run({H: 1}, 4.0, "a").device == "cpu"
    assert points(tmp_path, gpus=0.5).run({H: 1}, 4.0, "a").device == "cuda"


def test_a_point_whose_keys_do_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sub_chain"):
        points(tmp_path).run({H: 9}, 4.0, "a")  # of 5 steps
    with pytest.raises(UserError, match="cost has 1: raise it"):
        points(tmp_path, cost={"denoiser_forwards": 1}).run({H: 1}, 4.0, "a")


def test_what_a_trial_took_raises_what_is_predicted_of_the_next(tmp_path: Path) -> None:
    made, estimates = points(tmp_path), Estimates(lambda run: Probe(MODEL, SECONDS))
    two, three = made.run({H: 2}, 4.0, "a"), made.run({H: 3}, 4.0, "b")
    assert (estimates.peak_gib(two), estimates.peak_gib(three)) == (2.0, 3.0)
    estimates.learn(two, 2.5)
    assert estimates.peak_gib(three) == pytest.approx(3 * 1.25)
    estimates.learn(three, 1.0)  # less than predicted teaches nothing
    assert estimates.peak_gib(two) == pytest.approx(2.5)


def test_parts_are_measured_once_for_all_plans(tmp_path: Path) -> None:
    calls = []
    estimates = Estimates(lambda run: calls.append(run) or Probe(MODEL, SECONDS))  # type: ignore[func-returns-value]
    made = points(tmp_path)
    for length in (1, 2, 3):
        estimates.peak_gib(made.run({H: length}, 4.0, "a"))
    estimates.peak_gib(made.run({H: 1, "train.chunk_size": 2}, 4.0, "a"))
    assert len(calls) == 2


def counting(run: RunConfig) -> Probe:
    MEASURED[run.train.chunk_size] += 1
    if run.train.chunk_size == 4:
        raise UserError("too large")
    return Probe(MODEL, SECONDS)


MEASURED: Counter[int] = Counter()


def test_all_that_points_need_is_measured_before_the_search(tmp_path: Path) -> None:
    """Once for each size of chunks, whatever else differs; a later one would have to wait for the trials."""
    MEASURED.clear()
    space: Any = {"train.chunk_size": {"choice": [1, 2, 4]}, H: {"choice": [1, 2]}, SCALE: {"uniform": [0.01, 0.1]}}
    config = load_tune_config(written(tmp_path, space=space), [])
    made = Points(config, Estimates(counting))
    made.prepare()
    assert MEASURED == {1: 1, 2: 1, 4: 1}
    estimates = pickle.loads(pickle.dumps(made.estimates))  # as a search that is resumed
    assert estimates.peak_gib(made.run({H: 2, "train.chunk_size": 1}, 4.0, "a")) == 2.0
    with pytest.raises(UserError, match="too large"):
        estimates.peak_gib(made.run({H: 2, "train.chunk_size": 4}, 4.0, "a"))
    with pytest.raises(UserError, match="not measured before the search began; give keys"):
        estimates.peak_gib(made.run({H: 2, "estimator.zeroth_order.chunk_size": 1}, 4.0, "a"))
    assert MEASURED == {1: 1, 2: 1, 4: 1}


def test_the_predicted_peak_is_that_of_a_real_update(tmp_path: Path) -> None:
    made, estimates = points(tmp_path), Estimates(measured_parts)
    for length in (1, 3):
        run = made.run({H: length}, 4.0, "a")
        engine = Engine(run)
        state = TrainState(engine.model.initial_theta, run.train, run.estimator)
        took = peak_bytes(lambda: update(engine, state, None, Process()), engine.device)  # noqa: B023
        assert estimates.peak_gib(run) == pytest.approx((took + engine.held_bytes()) / GIB, rel=0.05)
