"""Actors in bfloat16 beside workers in float32: how far they may be, how far they are, what becomes of the terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_ray.config.run import RunConfig
from rlr_ray.core.half_order import half_order
from rlr_ray.core.kl import drift
from rlr_ray.errors import UserError
from rlr_ray.train.agreement import check_agreement, compared_chains
from rlr_ray.train.engine import Engine
from rlr_ray.train.held_out import evaluate
from rlr_ray.train.process import ALONE
from rlr_ray.train.sampling import Sampled, drift_step
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import logged, small_run
from tests.train.test_sampling import Elsewhere

HALF: dict[str, Any] = {"estimator": {"first_order": {"steps": 1}, "rest": "none", "half_order": {"weight": 1.0}}}


def config_of(dtype: str | None, **rollouts: Any) -> RunConfig:
    return small_run(Path("nowhere"), cluster={"rollouts": {"dtype": dtype, **rollouts}}, **HALF)


def one_update(config: RunConfig) -> tuple[dict[str, Any], Elsewhere]:
    engine, elsewhere = Engine(config), Elsewhere(config.on_actors)
    state = TrainState(engine.model.initial_theta, config.train, config.estimator)
    return update(engine, state, elsewhere, ALONE), elsewhere


def test_actors_have_their_own_keys_and_workers_the_recipes() -> None:
    config = config_of("bfloat16", compile=True)
    assert (config.on_actors.model.dtype, config.on_actors.model.compile) == ("bfloat16", True)
    assert (config.model.dtype, config.model.compile, config.actors_differ) == ("float32", False, True)
    assert not config_of(None).actors_differ and not config_of("float32").actors_differ


def test_an_actor_that_is_too_far_away_ends_the_run_and_one_that_is_near_is_told() -> None:
    config = config_of("bfloat16")
    assert config.cluster != "none"
    engine, elsewhere = Engine(config), Elsewhere(config.on_actors)
    with logged() as said:
        check_agreement(engine, elsewhere, config.cluster.rollouts)
    ours, theirs = (compared_chains(one, engine.model.initial_theta).double() for one in (engine, elsewhere.engine))
    difference = float((theirs - ours).norm() / ours.norm())
    assert 1e-4 < difference < 0.05 and f"{difference:.2g} of their size" in said[-1]
    limit = config.cluster.rollouts.model_copy(update={"tolerance": 0.9 * difference})
    with pytest.raises(UserError, match=r"dtype bfloat16.*allowed: cluster.rollouts.tolerance.*leave out dtype"):
        check_agreement(engine, elsewhere, limit)

    def broken(request: Any, chunks: Any) -> Any:
        back = elsewhere(request, chunks)
        nan = {"last": torch.full((1,), torch.nan)}
        return replace(back, results=[Sampled(one.indices, nan) for one in back.results])

    with pytest.raises(UserError, match="nan of their size"):
        check_agreement(engine, broken, config.cluster.rollouts)


def test_the_drift_of_an_update_is_the_divergence_of_the_two_denoisers_steps() -> None:
    """Measured on chains that the actor drew; against the two means computed beside each other at its latents."""
    config = config_of("bfloat16")
    row, elsewhere = one_update(config)
    engine = Engine(config)
    theta = engine.model.initial_theta  # the actor's own begins from factors in bfloat16
    k = drift_step(engine, 0, engine.plans(0))
    assert k is not None
    starts = [one.train_chains(0, range(config.train.chunk_size)).start for one in (elsewhere.engine, engine)]
    whole = elsewhere.engine.sampler.sample(theta, *starts[0])  # the actor encodes prompts, too
    with torch.no_grad():
        theirs = elsewhere.engine.sampler.mean(theta, k, whole.at(k), starts[0][2])
        ours = engine.sampler.mean(theta, k, whole.at(k), starts[1][2])
    expected = ((theirs - ours) / engine.model.schedule.sigma[k]).flatten(1).square().sum(1).mean() / 2
    assert row["actors_kl"] == pytest.approx(float(expected), rel=1e-3) and row["actors_kl"] > 1e-6
    same = engine.sampler.sample(theta, *starts[1])
    assert drift(engine.sampler, theta, same, k) < 1e-6 * row["actors_kl"]


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_half_order_takes_the_noise_that_this_denoiser_would_have_needed(
    dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of chains of another theta, where actors compute otherwise; the noise that was drawn, where they do not."""
    behind = []

    def noted(*arguments: Any, **options: Any) -> Any:
        behind.append(options["behind"])
        return half_order(*arguments, **options)

    monkeypatch.setattr("rlr_ray.core.chunk.half_order", noted)
    row, elsewhere = one_update(config_of(dtype))
    assert behind and set(behind) == {dtype is not None} and "ChainRequest" in elsewhere.sent
    assert ("actors_kl" in row) == (dtype is not None)


def test_evaluations_are_the_workers_own() -> None:
    config = config_of("bfloat16")
    engine, elsewhere = Engine(config), Elsewhere(config.on_actors)
    evaluate(engine, engine.model.initial_theta, rollouts=elsewhere)
    assert elsewhere.sent == {}


def test_keys_of_actors_without_any_are_refused() -> None:
    with pytest.raises(UserError, match=r"cluster.rollouts.dtype or compile.*max_actors is 0"):
        config_of("bfloat16", min_actors=0, max_actors=0)
