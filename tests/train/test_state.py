"""Weights, guides and the optimizer step, against their formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from rlr_ray.config.estimator import ZerothOrderConfig
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.plan import Plan
from rlr_ray.core.weighting import TermEstimate
from rlr_ray.errors import UserError
from rlr_ray.train.state import TrainState
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
    state = new_state(tmp_path)  # smoothing 1/2, m = 4
    first = state.weights(estimate(3.0).terms)
    # zeroth order: S = 9 - 4, V = 4, S / V = 5/4, smoothed 5/8 over 5/8 + 1/4; half order has no earlier estimate yet
    assert first == {"first_order": 1.0, "half_order": 0.0, "zeroth_order": pytest.approx(0.625 / 0.875)}
    state.update(estimate(3.0), first)
    second = state.weights(estimate(2.0).terms)
    # half order: this one's 4 times the earlier one's 6 over V = 1, smoothed 12; zeroth order: 5/16 + 0 / 4 / 2
    assert second["half_order"] == pytest.approx(12 / 12.25)
    assert second["zeroth_order"] == pytest.approx(0.3125 / 0.5625)
    state.update(estimate(2.0), second)
    third = state.weights(estimate(-1.0).terms)
    # earlier estimates 6 and 4 weigh 1 and 2: -2 * 14/3 over 1, smoothed 12 / 2 - 14/3
    assert third["half_order"] == pytest.approx((6 - 14 / 3) / (6 - 14 / 3 + 0.25))


def test_one_noisy_update_does_not_decide_the_weight(tmp_path: Path) -> None:
    """Twenty updates with S = V, one among them with a thousand times the scale and no signal."""
    state = new_state(tmp_path)
    for i in range(20):
        gradient, variance = (vector(40, 0, 0, 0), 1600.0) if i == 10 else (vector(1, 1, 0, 0), 1.0)
        weight = state.weights({"zeroth_order": TermEstimate(gradient, variance)})["zeroth_order"]
    assert weight == pytest.approx(0.8, abs=1e-3)  # 1 / (1 + 1/4)


def test_the_place_is_drawn_by_smoothed_half_order_norms(tmp_path: Path) -> None:
    """Norms of the updates that lay there, smoothing 1/2; places not yet visited count as the mean."""
    config = short_run(tmp_path, estimator={"smoothing": 0.5, "sub_chain": {"place": "importance"}})
    state = TrainState(THETA, config.train, config.estimator)
    assert state.place_weights(5) == [1.0] * 5
    for start, scale in ((0, 1.0), (2, 3.0), (2, 1.0)):  # half order's norm is twice the scale
        state.note_place(Plan(5, range(4, 5), (range(start, start + 2),), ()), estimate(scale))
    relative = [2 / 3, 1.0, 4 / 3, 1.0, 1.0]  # of 2 and (6 + 2) / 2, whose mean is 3
    powers = [math.exp(value) for value in relative]
    assert state.place_weights(5) == pytest.approx([power / sum(powers) for power in powers])
    assert new_state(tmp_path).place_weights(5) is None


def test_noise_shares_are_weighed_variances_over_the_squared_total() -> None:
    shares = estimate().noise_shares({"first_order": 1.0, "half_order": 0.5, "zeroth_order": 1.0})
    # |total|^2 = 1 + (0.5 * 2)^2 + 1; zeroth order's 4 / 3 is cut to 1
    assert shares == pytest.approx({"first_order": 0.5 / 3, "half_order": 0.25 / 3, "zeroth_order": 1.0})
    unknown = GradientEstimate({"first_order": TermEstimate(vector(1, 0), float("nan"))}, torch.zeros(2))
    assert unknown.noise_shares({}) == {}


def guided_state(tmp_path: Path, span: int | str) -> TrainState:
    zeroth = {"count": 8, "chunk_size": 4, "span": span}
    config = short_run(tmp_path, estimator={"smoothing": 0.5, "zeroth_order": zeroth})
    return TrainState(THETA, config.train, config.estimator)


def test_without_half_order_directions_are_guided_by_smoothed_gradients(tmp_path: Path) -> None:
    state = guided_state(tmp_path, "auto")
    assert state.directions().basis is None  # the first are isotropic
    state.weights(estimate().terms)
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


def with_rows(rows: Tensor) -> GradientEstimate:
    return GradientEstimate(estimate().terms, torch.zeros(2), half_order_rows=list(rows))


def test_with_half_order_directions_span_its_principal_components(tmp_path: Path) -> None:
    """Against numpy's singular vectors of the newest rows."""
    state, source = guided_state(tmp_path, 2), torch.Generator().manual_seed(0)
    assert state.directions().basis is None
    updates = [torch.randn(count, 4, generator=source) for count in (4, 4, 2, 1)]
    for rows in updates:
        state.update(with_rows(rows), {})
    kept = torch.cat(updates)[-8:]  # four for each of the two components
    _, _, vectors = numpy.linalg.svd(kept.double().numpy())
    expected = torch.from_numpy(vectors[:2]).float()
    basis = state.directions().basis
    assert basis is not None and basis.shape == (2, 4)
    torch.testing.assert_close(basis.T @ basis, expected.T @ expected)  # the same span


def test_the_span_grows_with_the_count() -> None:
    sizes = {80: 8, 320: 17, 1280: 32, 5120: 32, 8: 4}
    for count, size in sizes.items():
        assert ZerothOrderConfig(count=count).components == size
    assert ZerothOrderConfig(span=5).components == 5


def test_update_climbs(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    norm = state.update(estimate(), {"first_order": 1.0, "half_order": 0.5, "zeroth_order": 0.0})
    assert norm == pytest.approx(2**0.5)
    expected = THETA + 0.02 * vector(1, 1, 0, 0)  # Adam's first step is the learning rate times the sign
    torch.testing.assert_close(state.theta.detach(), expected, atol=1e-6, rtol=0)


def test_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    state, weights = new_state(tmp_path), {"first_order": 1.0, "half_order": 1.0, "zeroth_order": 1.0}
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    state.weights(estimate().terms)
    state.update(with_rows(rows), weights)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    loaded = new_state(tmp_path)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (state, loaded):
        assert one.weights(estimate(3.0).terms)["half_order"] > 0
        one.update(with_rows(rows[:3] + 1), weights)
    assert torch.equal(state.theta, loaded.theta)
    assert (state.signals, state.step) == (loaded.signals, loaded.step)
    assert torch.equal(state.directions().basis, loaded.directions().basis)  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_is_refused_before_it_touches_theta(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    bad = GradientEstimate({"half_order": TermEstimate(vector(0, float("inf"), 0, 0), 1.0)}, torch.zeros(2))
    with pytest.raises(UserError, match=r"update 0: the half-order gradient is not finite.*max_grad_norm"):
        state.update(bad, {"half_order": 1.0})
    assert torch.equal(state.theta.detach(), THETA)
