"""Every form of the estimate on Ray has the bits that it has in this process; so have a switch and a step back.

Runs on Ray have two workers, and two rollout actors where there is zeroth order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlr_ray.cluster.launch import run_on_ray
from rlr_ray.config.estimator import merge
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.train.run_folder import RunFolder
from tests.cluster.test_runs import CLUSTER, ignore
from tests.runs import FALLING, outcome, small_run, train_here

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("cluster")]

NOTHING_ELSE: dict[str, Any] = {"first_order": {"steps": 0}, "sub_chain": {"length": 0}, "rest": "none"}
FORWARD: dict[str, Any] = {"score": "forward", "baseline": "running", "weight": 1.0}
BRANCHES: dict[str, Any] = {"rest": "half_order", "half_order": {"score": "branches", "weight": 1.0}}
RLR: dict[str, Any] = {
    "first_order": {"steps": 2, "clip": 0.5},
    "half_order": FORWARD | {"weight": "even"},
    "zeroth_order": {"count": 4, "clip": 1.0},
}
BLACK_BOX: dict[str, Any] = {  # its reward is soon explained, and then not
    "reward": {"name": "tests.models.tiny:brightness", "differentiable": False},
    "estimator": NOTHING_ELSE
    | {
        "first_order": {"steps": "all", "clip": 0.5},
        "half_order": FORWARD,
        "surrogate": {"use": "switch", "trust": 0.05, "window": 1, "batch_size": 8},
    },
    "train": {"iterations": 6, "chains": 8},
}


def on_ray(folder: Path, keys: dict[str, Any], *, resume: bool = False, **cluster: Any) -> RunConfig:
    asked = CLUSTER | {"workers": 2, "rollouts": {"cpus": 0.25, "min_actors": 2}} | cluster
    config = small_run(folder, name="on-ray", cluster=asked, **keys)
    assert config.cluster != "none"
    run_on_ray(config, config.cluster, ignore, lambda: RunFolder(config).begin(resume=resume))
    return config


def bits(config: RunConfig) -> dict[str, Any]:
    """Theta, the gain and what each update did."""
    told = outcome(config.folder)
    did = [(row["plan"], row["reward_mean"], row["gradient_norm"], row["stepped_back"]) for row in told["rows"]]
    return {"theta": told["theta_sha256"], "gain": told["gain"], "updates": did}


@pytest.mark.parametrize(
    "keys",
    [
        {"estimator": NOTHING_ELSE | BRANCHES},
        {"estimator": NOTHING_ELSE | {"half_order": FORWARD | {"pull": 0.1}}, "guards": {"ema": 0.9}},
        {"estimator": RLR, "guards": {"ema": 0.9}},
    ],
    ids=["branches", "forward term", "rlr"],
)
def test_a_form_has_the_same_bits_on_ray(tmp_path: Path, keys: dict[str, Any]) -> None:
    here = small_run(tmp_path, name="here", **keys)
    train_here(here)
    assert bits(on_ray(tmp_path, keys)) == bits(here)


@pytest.mark.parametrize("actors", [0, 1])
def test_a_base_that_is_cut_among_workers_has_the_same_bits(tmp_path: Path, actors: int) -> None:
    """Three chunks for two workers, evaluations by the leading one; with an actor, whose base is whole, or none."""
    keys: dict[str, Any] = {"estimator": RLR, "train": {"chains": 6, "max_change": 0.03}, "evaluation": {"every": 1}}
    here = small_run(tmp_path, name="here", **keys)
    train_here(here)
    cluster = {
        "worker": {"cpus": 0.5, "shard": True},
        "rollouts": {"cpus": 0.25, "min_actors": actors, "max_actors": actors},
    }
    assert bits(on_ray(tmp_path, keys, **cluster)) == bits(here)


def test_actors_that_compute_otherwise_leave_the_same_bits_however_many_there_are(tmp_path: Path) -> None:
    """No worker samples what they do. One that is too far away ends the run."""
    keys: dict[str, Any] = {"estimator": RLR, "train": {"iterations": 2}}
    rollouts = {"cpus": 0.25, "dtype": "bfloat16"}
    one, two = (
        bits(on_ray(tmp_path / str(count), keys, rollouts=rollouts | {"min_actors": count, "max_actors": count}))
        for count in (1, 2)
    )
    assert one == two
    with pytest.raises(UserError, match=r"cluster.rollouts.tolerance, 1e-06"):
        on_ray(tmp_path / "far", keys, rollouts=rollouts | {"tolerance": 1e-6})


@pytest.mark.parametrize(("keys", "cut"), [(BLACK_BOX, 3), (FALLING, 4)], ids=["switch", "step back"])
def test_a_run_on_ray_that_goes_on_around_an_event_ends_the_same(
    tmp_path: Path, keys: dict[str, Any], cut: int
) -> None:
    """Ended just before first order switches to the surrogate, or the run steps back, and then resumed."""
    keys = merge(keys, {"train": {"iterations": cut + 3}})
    here = small_run(tmp_path, name="here", **keys)
    train_here(here)
    plans, _, _, back = zip(*bits(here)["updates"], strict=True)
    assert plans[cut - 1] != plans[cut] == "first order [0, 4)" or back[cut]
    assert not any(back[:cut]) and len(set(plans[:cut])) == 1
    on_ray(tmp_path, merge(keys, {"train": {"iterations": cut}}))
    assert bits(on_ray(tmp_path, keys, resume=True)) == bits(here)
