"""The default plan: decided by what the rewards say; what it costs in memory, measured; cut and resumed as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

import rlr_ray.train.activations as activations
from rlr_ray.config.checks import check_first_order
from rlr_ray.config.describe import describe_plan
from rlr_ray.config.presets import PRESETS
from rlr_ray.config.recipe import parse_config, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.models.batches import Batches
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import RECIPE, outcome, small_run, tiny, train_here

BARE = {key: value for key, value in RECIPE.items() if key not in ("estimator", "train")}


def scores(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
    return images.mean((1, 2, 3)).detach()


scores.differentiable = False  # type: ignore[attr-defined]


def plan_of(**changes: Any) -> RunConfig:
    return parse_config(BARE | changes)


def test_the_default_plan_is_decided_by_what_the_rewards_say() -> None:
    gradient, black_box = plan_of(), plan_of(reward={"name": "digits", "differentiable": False})
    assert gradient.estimator.first_order.steps == "all" and gradient.estimator.first_order.clip == 2
    assert gradient.estimator.surrogate is None and not gradient.plan_shape.has_half_order
    assert black_box.estimator.half_order.score == "forward" and black_box.plan_shape.switch
    dear = plan_of(reward={"name": "digits", "gradient": "surrogate"})
    assert dear.estimator == black_box.estimator
    two = {"a": {"name": "digits"}, "b": {"name": "digits", "gradient": "surrogate"}}
    mixture = parse_config({k: v for k, v in BARE.items() if k != "reward"} | {"rewards": two})
    assert mixture.estimator == black_box.estimator and mixture.mixed
    shape = mixture.plan_shape.alternatives[0]
    assert shape.first_order_steps == 5 and shape.has_half_order  # both in one update


def test_a_reward_of_ones_own_decides_when_it_is_imported() -> None:
    config = plan_of(reward={"name": "tests.train.test_auto:scores"}, estimator={"half_order": {"draws": 5}})
    assert config.estimator.surrogate is None  # it is not known yet
    resolved = resolve(config)
    assert resolved.estimator.surrogate is not None and resolved.estimator.half_order.draws == 5
    written = yaml.safe_load(yaml.safe_dump(resolved.model_dump(mode="json")))
    assert resolve(parse_config(written)) == resolved


def test_keys_beside_auto_stay() -> None:
    changes = {"reward": {"name": "digits", "differentiable": False}}
    config = plan_of(**changes, estimator={"surrogate": {"trust": 0.7}, "first_order": {"clip": None}})
    assert config.estimator.surrogate is not None and config.estimator.surrogate.trust == 0.7
    assert config.estimator.first_order.clip is None and config.estimator.half_order.score == "forward"
    said = describe_plan(config)
    assert all(word in said for word in ("3 draws a chain", "once a surrogate is trusted", "explains 70%"))


@pytest.mark.parametrize("name", ["digits", "tests.train.test_auto:scores"])  # of one's own: known only once imported
@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"surrogate": None, "first_order": {"steps": 0}}, ("forward", False, 0)),
        ({"surrogate": None, "half_order": {"score": "path"}, "rest": "half_order"}, ("path", False, "all")),
        ({"surrogate": {"trust": 0.7}}, ("forward", True, "all")),
        ({"half_order": {"score": "branches"}}, ("branches", True, "all")),
    ],
)
def test_a_key_beside_auto_stays_though_it_is_what_another_plan_has_by_default(
    name: str, stated: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    config = resolve(
        plan_of(reward={"name": name, "differentiable": False if name == "digits" else None}, estimator=stated)
    )
    estimator = config.estimator
    assert (estimator.half_order.score, estimator.surrogate is not None, estimator.first_order.steps) == expected
    assert resolve(parse_config(config.model_dump(mode="json"))) == config


def test_a_surrogate_that_nothing_passes_through_is_refused() -> None:
    for estimator, remedy in (
        ({"first_order": {"steps": 0}}, "estimator.surrogate: null"),
        ({"surrogate": None}, "leave estimator.surrogate out"),
    ):
        with pytest.raises(UserError, match=remedy):
            check_first_order(plan_of(reward={"name": "digits", "differentiable": False}, estimator=estimator))
    with pytest.raises(UserError, match="every reward has one"):
        check_first_order(plan_of(estimator={"surrogate": {"name": "online"}}))


def test_a_denoiser_without_gradients_is_perturbed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the learning rate, the limit of a change, the average and the KL are measured."""
    predict = Batches.output

    def not_differentiable(self: Any, batch: Any, theta: torch.Tensor, *rest: Any, **keys: Any) -> torch.Tensor:
        assert not (theta.requires_grad and torch.is_grad_enabled())
        return predict(self, batch, theta, *rest, **keys).detach()

    monkeypatch.setattr(Batches, "output", not_differentiable)
    values = {"model": tiny() | {"differentiable": False}, "sampler": {"steps": 4}, "evaluation": {"chains": 2}}
    estimator = {"preset": "auto", "zeroth_order": {"count": 4, "chunk_size": 4}}
    values |= {"estimator": estimator, "output_dir": str(tmp_path)}
    config = parse_config(BARE | values | {"train": {"iterations": 2, "chains": 2, "chunk_size": 2}})
    assert config.estimator.preset == "es" and config.estimator.zeroth_order.count == 4
    assert config.plan_shape.has_zeroth_order and not config.plan_shape.has_half_order
    assert resolve(config) == config == parse_config(config.model_dump())
    told = outcome(train_here(config).path)
    assert all(row["zeroth_order_norm"] > 0 and row["prediction_change"] > 0 for row in told["rows"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"estimator": "measure"}, r"compared by .*set estimator\.preset: auto"),
        ({"guards": {"kl_penalty": 1.0}}, r"but guards\.kl_penalty would .*allowed: zeroth order alone"),
    ],
)
def test_what_differentiates_a_denoiser_without_gradients_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"model.differentiable is false.*{words}"):
        plan_of(model={"name": "digits", "differentiable": False}, **changes)


AUTO: dict[str, Any] = {  # over the keys of the tests' recipe
    **PRESETS["auto"],
    "preset": "auto",
    "first_order": {"steps": "all", "clip": 2.0},
}
BLACK_BOX: dict[str, Any] = {
    "estimator": AUTO
    | {
        "half_order": {"score": "forward", "baseline": "running", "weight": 1.0},
        "surrogate": {"steps_per_update": 4, "batch_size": 4, "window": 1},
    },
    "reward": {"differentiable": False},
    "train": {"iterations": 5, "checkpoint_every": 2, "learning_rate": "auto", "warmup": 4, "max_change": 0.03},
}


def test_a_black_box_run_that_is_cut_and_resumed_ends_the_same(tmp_path: Path) -> None:
    """With the running baseline, the surrogate, the trust in it, and the learning rate that is fitted along the way."""
    whole = train_here(small_run(tmp_path / "whole", **BLACK_BOX)).path
    config = small_run(tmp_path / "cut", **BLACK_BOX)
    with pytest.raises(KeyboardInterrupt):
        train_here(config, stop_after=3)
    assert str(outcome(train_here(config, resume=True).path)) == str(outcome(whole))  # some columns are nan


def test_steps_are_checkpointed_where_they_would_not_fit_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    thetas = []
    for free, expected in ((1e15, False), (1e3, True)):
        monkeypatch.setattr(activations, "free_bytes", lambda device, free=free: free)
        engine = Engine(small_run(Path("nowhere"), estimator=AUTO))
        state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
        rows = [update(engine, state, None, ALONE) for _ in range(2)]
        assert engine.checkpoint_steps is expected
        assert rows[0]["denoiser_forwards"] == 4 * (4 + 4 * expected)
        thetas.append(state.theta.detach())
    assert torch.equal(*thetas)
    assert activations.step_bytes(engine) > 4 * 4 * 8 * 64  # more than a latent


def test_what_a_step_keeps_is_counted_once_with_data_and_without() -> None:
    """Of tanh(w x): autograd keeps each step's output, which is the next one's input; the weight is all steps'."""

    def kept() -> int:
        weight = torch.ones(100, requires_grad=True)
        return activations.kept_bytes(lambda latent, k: torch.tanh(weight * latent), torch.ones(100))

    assert kept() == 4 * 100
    with FakeTensorMode():
        assert kept() == 4 * 100
