"""Weights, guides and the optimizer step, against their formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.terms import TermEstimate
from rlr_ray.errors import UserError
from rlr_ray.state import TrainState
from tests.runs import short_run

THETA = torch.tensor([1.0, -2.0, 0.5, 3.0])


def new_state(tmp_path: Path) -> TrainState:
    config = short_run(tmp_path, estimator={"smoothing": 0.5, "weight_averaging": 4})
    return TrainState(THETA, config.train, config.estimator)


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
    state = new_state(tmp_path)
    first = state.weights(estimate().terms)
    # half order: S = 4 - 1 = 3, V = 1, m = 4: 3 / (3 + 1/4); zeroth order: S = 1 - 4 < 0
    assert first == {"first_order": 1.0, "half_order": pytest.approx(12 / 13), "zeroth_order": 0.0}
    second = state.weights(estimate(2.0).terms)
    # smoothed with 1/2 from 0: half order S = 3/4 + 15/2, V = 1/4 + 1/2; zeroth order S = -3/4 + 0, V = 3
    assert second["half_order"] == pytest.approx(8.25 / (8.25 + 0.75 / 4))
    assert second["zeroth_order"] == 0.0


def test_noise_shares_are_weighed_variances_over_the_squared_total() -> None:
    shares = estimate().noise_shares({"first_order": 1.0, "half_order": 0.5, "zeroth_order": 1.0})
    # |total|^2 = 1 + (0.5 * 2)^2 + 1; zeroth order's 4 / 3 is cut to 1
    assert shares == pytest.approx({"first_order": 0.5 / 3, "half_order": 0.25 / 3, "zeroth_order": 1.0})
    unknown = GradientEstimate({"first_order": TermEstimate(vector(1, 0), float("nan"))}, torch.zeros(2))
    assert unknown.noise_shares({}) == {}


def test_the_first_directions_are_isotropic_then_guided_by_what_came_before(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    assert state.directions().basis is None
    state.update(estimate(), {"first_order": 1.0, "half_order": 1.0, "zeroth_order": 1.0})
    directions = state.directions()
    assert directions.basis is not None
    torch.testing.assert_close(directions.basis @ directions.basis.T, torch.eye(directions.dimensions))
    guides = [vector(1, 0, 0, 0), vector(0, 2, 0, 0), vector(1, 2, 1, 0), state.theta.detach() - THETA]
    for guide in guides:  # each lies in the span
        projected = directions.basis.T @ (directions.basis @ guide)
        torch.testing.assert_close(projected, guide, atol=1e-5, rtol=1e-4)
    assert directions.dimensions == 3  # all four in three dimensions
    moved = directions.step_size * directions.lift(torch.eye(3))  # a unit step in each dimension
    torch.testing.assert_close(moved.square().sum(), torch.tensor(4 * 0.01**2))  # as far as all four numbers would


def test_update_climbs(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    norm = state.update(estimate(), {"first_order": 1.0, "half_order": 0.5, "zeroth_order": 0.0})
    assert norm == pytest.approx(2**0.5)
    expected = THETA + 0.02 * vector(1, 1, 0, 0)  # Adam's first step is the learning rate times the sign
    torch.testing.assert_close(state.theta.detach(), expected, atol=1e-6, rtol=0)


def test_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    state, weights = new_state(tmp_path), {"first_order": 1.0, "half_order": 1.0, "zeroth_order": 1.0}
    state.weights(estimate().terms)
    state.update(estimate(), weights)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    loaded = new_state(tmp_path)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (state, loaded):
        one.weights(estimate(3.0).terms)
        one.update(estimate(3.0), weights)
    assert torch.equal(state.theta, loaded.theta)
    assert (state.signals, state.variances, state.step) == (loaded.signals, loaded.variances, loaded.step)
    assert torch.equal(state.directions().basis, loaded.directions().basis)  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_is_refused_before_it_touches_theta(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    bad = GradientEstimate({"half_order": TermEstimate(vector(0, float("inf"), 0, 0), 1.0)}, torch.zeros(2))
    with pytest.raises(UserError, match=r"update 0: the half-order gradient is not finite.*max_grad_norm"):
        state.update(bad, {"half_order": 1.0})
    assert torch.equal(state.theta.detach(), THETA)
