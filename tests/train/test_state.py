"""Weights, guides, the optimizers and their schedules, against their formulas."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from rlr_ray.config.estimator import ZerothOrderConfig
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.plan import Plan
from rlr_ray.core.weighting import TermEstimate
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from rlr_ray.train.state import SCHEDULES, TrainState
from tests.runs import short_run

THETA = torch.tensor([1.0, -2.0, 0.5, 3.0])


PLAN = Plan(5, range(4, 5), (range(2, 4),), (0, 1))


def new_state(tmp_path: Path, train: Any = None, guards: Any = None, **estimator: Any) -> TrainState:
    estimator = {"smoothing": 0.5, "weight_averaging": 4} | estimator
    config = short_run(tmp_path, estimator=estimator, train=train or {}, guards=guards or {})
    return TrainState(THETA, config.train, config.estimator, config.guards)


def take(state: TrainState, found: GradientEstimate, plan: Plan = PLAN) -> dict[str, float]:
    """One update; the weights of its terms."""
    weights = state.adaptive.observe(plan, found)
    state.update(found, weights)
    return weights


def vector(*values: float) -> Tensor:
    return torch.tensor([float(value) for value in values])


def estimate(scale: float = 1.0) -> GradientEstimate:
    terms = {
        "first_order": TermEstimate(scale * vector(1, 0, 0, 0), 0.5),
        "half_order": TermEstimate(scale * vector(0, 2, 0, 0), 1.0),
        "zeroth_order": TermEstimate(scale * vector(0, 0, 1, 0), 4.0),
    }
    return GradientEstimate(terms, torch.zeros(2))


def test_auto_weights_are_the_smoothed_signal_over_signal_plus_noise(tmp_path: Path) -> None:
    state = new_state(tmp_path)  # smoothing 1/2, m = 4
    first = take(state, estimate(3.0))
    # zeroth order: S = 9 - 4, V = 4, S / V = 5/4, smoothed 5/8 over 5/8 + 1/4; half order has no earlier estimate yet
    assert first == {"first_order": 1.0, "half_order": 0.0, "zeroth_order": pytest.approx(0.625 / 0.875)}
    second = take(state, estimate(2.0))
    # half order: this one's 4 times the earlier one's 6 over V = 1, smoothed 12; zeroth order: 5/16 + 0 / 4 / 2
    assert second["half_order"] == pytest.approx(12 / 12.25)
    assert second["zeroth_order"] == pytest.approx(0.3125 / 0.5625)
    third = take(state, estimate(-1.0))
    # earlier estimates 6 and 4 weigh 1 and 2: -2 * 14/3 over 1, smoothed 12 / 2 - 14/3
    assert third["half_order"] == pytest.approx((6 - 14 / 3) / (6 - 14 / 3 + 0.25))


def test_even_weights_give_every_term_first_orders_length_over_updates(tmp_path: Path) -> None:
    """Of running norms, so an update's own length still counts; a spike counts for no more than three times it."""
    even = {"half_order": {"score": "forward", "weight": "even"}, "zeroth_order": {"weight": "even"}}
    state = new_state(tmp_path, **even)  # smoothing 1/2; norms 1, 2 and 1
    assert take(state, estimate()) == {"first_order": 1.0, "half_order": 0.5, "zeroth_order": 1.0}
    terms = dict(estimate().terms) | {"half_order": TermEstimate(vector(0, 100, 0, 0), 1.0)}
    weights = take(state, GradientEstimate(terms, torch.zeros(2)))
    assert weights["half_order"] == pytest.approx(1 / (2 / 2 + 6 / 2))
    climbing = GradientEstimate(
        terms, torch.zeros(2), of_surrogate=True
    )  # a surrogate's gradients have norms of their own
    assert take(state, climbing)["half_order"] == pytest.approx(1 / 100)
    alone = GradientEstimate({"half_order": terms["half_order"]}, torch.zeros(2))
    assert take(state, alone)["half_order"] == 1.0


def test_even_weights_leave_rewards_theirs(tmp_path: Path) -> None:
    """Half order of a reward with a fifth of the spread is made a fifth as long as first order of the other."""
    state = new_state(tmp_path, half_order={"score": "forward", "weight": "even"})
    spreads = {"first_order": 1.0, "half_order": 0.2, "zeroth_order": 0.2}
    assert take(state, replace(estimate(), spreads=spreads))["half_order"] * 2 == pytest.approx(0.2)


def test_one_noisy_update_does_not_decide_the_weight(tmp_path: Path) -> None:
    """Twenty updates with S = V, one among them with a thousand times the scale and no signal."""
    state = new_state(tmp_path)
    for i in range(20):
        gradient, variance = (vector(40, 0, 0, 0), 1600.0) if i == 10 else (vector(1, 1, 0, 0), 1.0)
        found = GradientEstimate({"zeroth_order": TermEstimate(gradient, variance)}, torch.zeros(2))
        weight = state.adaptive.observe(PLAN, found)["zeroth_order"]
    assert weight == pytest.approx(0.8, abs=1e-3)  # 1 / (1 + 1/4)


def test_the_position_is_drawn_by_smoothed_half_order_norms(tmp_path: Path) -> None:
    """Norms of the updates that lay there, smoothing 1/2; positions not yet visited count as the mean."""
    state = new_state(tmp_path, sub_chain={"place": "importance"})
    assert state.propose(5).position_weights == [1.0] * 5
    for start, scale in ((0, 1.0), (2, 3.0), (2, 1.0)):  # half order's norm is twice the scale
        state.adaptive.observe(Plan(5, range(4, 5), (range(start, start + 2),), ()), estimate(scale))
    state.adaptive.observe(Plan(5, range(4, 5), (range(3, 4), range(0, 1)), ()), estimate(9.0))  # of neither alone
    relative = [2 / 3, 1.0, 4 / 3, 1.0, 1.0]  # of 2 and (6 + 2) / 2, whose mean is 3
    powers = [math.exp(value) for value in relative]
    assert state.propose(5).position_weights == pytest.approx([power / sum(powers) for power in powers])
    assert new_state(tmp_path).propose(5).position_weights is None


def test_noise_shares_are_weighed_variances_over_the_squared_total() -> None:
    shares = estimate().noise_shares({"first_order": 1.0, "half_order": 0.5, "zeroth_order": 1.0})
    # |total|^2 = 1 + (0.5 * 2)^2 + 1; zeroth order's 4 / 3 is cut to 1
    assert shares == pytest.approx({"first_order": 0.5 / 3, "half_order": 0.25 / 3, "zeroth_order": 1.0})
    unknown = GradientEstimate({"first_order": TermEstimate(vector(1, 0), float("nan"))}, torch.zeros(2))
    assert unknown.noise_shares({}) == {}


def guided_state(tmp_path: Path, span: int | str) -> TrainState:
    return new_state(tmp_path, zeroth_order={"count": 8, "chunk_size": 4, "span": span})


def test_without_half_order_directions_are_guided_by_smoothed_gradients(tmp_path: Path) -> None:
    state = guided_state(tmp_path, "auto")
    assert state.propose(5).directions.basis is None  # the first are isotropic
    state.adaptive.observe(PLAN, estimate())
    state.update(estimate(), {"first_order": 1.0, "half_order": 1.0, "zeroth_order": 1.0})
    directions = state.propose(5).directions
    assert directions.basis is not None
    torch.testing.assert_close(directions.basis @ directions.basis.T, torch.eye(directions.dimensions))
    guides = [vector(1, 0, 0, 0), vector(0, 2, 0, 0), vector(1, 2, 1, 0), state.theta.detach() - THETA]
    for guide in guides:  # each lies in the span
        projected = directions.basis.T @ (directions.basis @ guide)
        torch.testing.assert_close(projected, guide, atol=1e-5, rtol=1e-4)
    assert directions.dimensions == 3  # all four in three dimensions
    moved = directions.step_size * directions.lift(torch.eye(3))  # a unit step in each dimension
    torch.testing.assert_close(moved.square().sum(), torch.tensor(4 * 0.01**2))  # as far as all four numbers would


def with_rows(rows: Tensor) -> GradientEstimate:
    return GradientEstimate(estimate().terms, torch.zeros(2), half_order_rows=list(rows))


def test_with_half_order_directions_span_its_principal_components(tmp_path: Path) -> None:
    """Against numpy's singular vectors of the newest rows."""
    state, source = guided_state(tmp_path, 2), torch.Generator().manual_seed(0)
    assert state.propose(5).directions.basis is None and state.propose(5).half_order_rows == 4
    updates = [torch.randn(count, 4, generator=source) for count in (4, 4, 2, 1)]
    for rows in updates:
        state.adaptive.observe(PLAN, with_rows(rows))
    kept = torch.cat(updates)[-8:]  # four for each of the two components
    _, _, vectors = numpy.linalg.svd(kept.double().numpy())
    expected = torch.from_numpy(vectors[:2]).float()
    basis = state.propose(5).directions.basis
    assert basis is not None and basis.shape == (2, 4)
    torch.testing.assert_close(basis.T @ basis, expected.T @ expected)  # the same span


def test_the_span_grows_with_the_count() -> None:
    sizes = {80: 8, 320: 17, 1280: 32, 5120: 32, 8: 4}
    for count, size in sizes.items():
        assert ZerothOrderConfig(count=count).components == size
    assert ZerothOrderConfig(span=5).components == 5


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_steps_are_adamws(tmp_path: Path, max_grad_norm: float | None) -> None:
    """Against the algorithm's formulas (Loshchilov and Hutter 2019), upwards, with betas, decay and clipping."""
    b1, b2, decay, rate = 0.5, 0.7, 0.1, 0.02
    train = {"betas": [b1, b2], "weight_decay": decay, "learning_rate": rate, "max_grad_norm": max_grad_norm}
    state, theta, m, v = new_state(tmp_path, train), THETA.double(), 0.0, 0.0
    for k, scale in enumerate((1.0, -2.0, 0.5), start=1):
        gradient = scale * vector(1, 1, 0.5, 0).double()
        norm = state.update(estimate(scale), {"first_order": 1.0, "half_order": 0.5, "zeroth_order": 0.5})
        assert norm == pytest.approx(float(gradient.norm()))  # before clipping
        g = gradient * min(1.0, (max_grad_norm or math.inf) / float(gradient.norm()))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = m / (1 - b1**k) / ((v / (1 - b2**k)).sqrt() + 1e-8)
        theta = theta * (1 - rate * decay) + rate * step
    torch.testing.assert_close(state.theta.detach().double(), theta, atol=1e-6, rtol=1e-5)


def test_steps_are_sgds(tmp_path: Path) -> None:
    """With momentum, from optimizer_options; directions may lie along it, too."""
    train = {"optimizer": "SGD", "optimizer_options": {"momentum": 0.5}, "learning_rate": 0.1, "weight_decay": 0.2}
    state = new_state(tmp_path, train)
    theta, velocity = THETA, torch.zeros(4)
    for scale in (1.0, -2.0):
        state.update(estimate(scale), {"half_order": 0.0, "zeroth_order": 0.0})
        velocity = 0.5 * velocity + scale * vector(1, 0, 0, 0) - 0.2 * theta
        theta = theta + 0.1 * velocity
    torch.testing.assert_close(state.theta.detach(), theta)
    basis = state.propose(5).directions.basis
    assert basis is not None
    torch.testing.assert_close(basis.T @ (basis @ velocity), velocity)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"optimizer": "Adamm"}, "train.optimizer is 'Adamm'; allowed: .*AdamW.*SGD"),
        ({"optimizer": "LBFGS"}, "train.optimizer is 'LBFGS'; allowed"),
        ({"optimizer": "SGD", "betas": [0.5, 0.9]}, "train.betas is set, but SGD has no betas; leave it out"),
        ({"optimizer": "SGD", "optimizer_options": {"momentun": 1}}, "has momentun; allowed for SGD: .*momentum"),
        ({"optimizer_options": {"lr": 1}}, "has lr; allowed for AdamW: .*; learning rate, betas"),
        ({"optimizer_options": {"eps": -1}}, "do not suit AdamW: Invalid epsilon value: -1"),
        ({"optimizer": "Adam8bit"}, "needs bitsandbytes.*pip install bitsandbytes, or set train.optimizer: AdamW"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(
    train: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=message):
        new_state(tmp_path, train)


def test_adam8bit_is_bitsandbytes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of that name which, like bitsandbytes', cannot maximise."""

    class Adam8bit(torch.optim.Adam):
        def __init__(self, params: Any, lr: float, betas: Any, eps: float = 1e-8, weight_decay: float = 0.0):
            super().__init__(params, lr, betas, eps, weight_decay)

    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["bitsandbytes.optim"], "Adam8bit", Adam8bit, raising=False)
    state = new_state(tmp_path, {"optimizer": "Adam8bit"})
    state.update(estimate(), {})
    assert isinstance(state.optimizer, Adam8bit) and bool((state.theta > THETA)[:3].all())


def test_learning_rates_follow_their_schedule(tmp_path: Path) -> None:
    """Over four updates to a quarter; by the number of the update alone, whatever came before."""
    rates = {
        "constant": [1, 1, 1, 1],
        "linear": [1, 0.8125, 0.625, 0.4375],
        "cosine": [1, 0.25 + 0.75 * (1 + 0.5**0.5) / 2, 0.625, 0.25 + 0.75 * (1 - 0.5**0.5) / 2],
    }
    assert rates.keys() == SCHEDULES.keys()
    for schedule, factors in rates.items():
        state = new_state(tmp_path, {"learning_rate": 0.01, "schedule": schedule, "schedule_final": 0.25})
        found = []
        for _ in factors:
            state.update(estimate(), {})
            found += [group["lr"] for group in state.optimizer.param_groups]
        assert found == pytest.approx([0.01 * factor for factor in factors])
    longer = new_state(tmp_path, {"iterations": 8, "learning_rate": 0.01, "schedule": "linear", "schedule_final": 0})
    longer.load_state_dict(state.state_dict())  # resumed for four more: on along the longer schedule
    assert longer.learning_rate == pytest.approx(0.005)


def everything(value: Any) -> Any:
    """A state as plain values, which compare."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: everything(one) for name, one in value.items()}
    return [everything(one) for one in value] if isinstance(value, list | tuple) else value


def test_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Every statistic, the optimizer and the average of theta; and each of them matters to what comes after."""
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "guards": {"ema": 0.9},
        "sub_chain": {"place": "importance"},
        "zeroth_order": {"span": 2},
    }
    state = new_state(tmp_path, **options)
    for count in (5, 2):
        take(state, with_rows(rows[:count]))
    state.adaptive.observe_surrogate(vector(1, 2, 3, 5), vector(1, 2, 4, 4), torch.zeros(4))
    torch.save(state.state_dict(), tmp_path / "state.pt")
    loaded = new_state(tmp_path, **options)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (state, loaded):
        assert take(one, with_rows(rows[:3] + 1))["half_order"] > 0
    assert everything(loaded.state_dict()) == everything(state.state_dict())
    ours, theirs = state.propose(5), loaded.propose(5)
    assert ours.position_weights == theirs.position_weights != [1.0] * 5
    assert torch.equal(ours.directions.basis, theirs.directions.basis)  # type: ignore[arg-type]
    assert torch.equal(state.theta_to_save, loaded.theta_to_save)
    assert not torch.equal(state.theta_to_save, state.theta)
    fresh = new_state(tmp_path, **options)
    for name, value in vars(fresh.adaptive).items():
        assert everything(value) == everything(vars(state.adaptive)[name]) or name in fresh.adaptive.state_dict(), name


def test_a_gradient_that_is_not_finite_is_refused_before_it_touches_theta(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    bad = GradientEstimate({"half_order": TermEstimate(vector(0, float("inf"), 0, 0), 1.0)}, torch.zeros(2))
    with pytest.raises(UserError, match=r"update 0: the half-order gradient is not finite.*max_grad_norm"):
        state.update(bad, {"half_order": 1.0})
    assert torch.equal(state.theta.detach(), THETA)


@pytest.mark.parametrize(("baseline", "groups"), [("prompt", [0, 0, 0, 0, 1, 1, 1, 1]), ("batch", [0] * 8)])
def test_chains_that_share_a_baseline_are_those_of_a_prompt_or_all(
    baseline: str, groups: list[int], tmp_path: Path
) -> None:
    config = short_run(tmp_path, estimator={"half_order": {"baseline": baseline}})
    engine: Any = SimpleNamespace(config=config, device="cpu")
    assert Engine.groups(engine).tolist() == groups
