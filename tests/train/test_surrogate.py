"""The surrogate that learns, what it is trusted with, and whole runs with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.cli.train import describe_results
from rlr_ray.config.checks import check_first_order
from rlr_ray.config.describe import describe_plan
from rlr_ray.config.run import RunConfig
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.seeds import normal
from rlr_ray.core.trust import Trust
from rlr_ray.core.weighting import TermEstimate
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from rlr_ray.train.online import online_surrogate
from rlr_ray.train.process import Process
from rlr_ray.train.regressor import Regressor, masked_mse
from rlr_ray.train.state import TrainState
from rlr_ray.train.surrogate import OnlineSurrogate
from rlr_ray.train.update import update
from tests.runs import outcome, shared, small_run, train_here

CHAINS, FEATURES = 80, 10
GROUPS = torch.arange(CHAINS) // 8
FULL = {"first_order": {"steps": "all"}, "checkpoint_steps": True, "sub_chain": {"length": 0}}


def surrogate_run(folder: Path, changes: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    """A small run whose reward is black-box, under a plan that a surrogate can have."""
    estimator = FULL | {"rest": "half_order", "surrogate": {"name": "online", "steps_per_update": 5}} | keys
    if estimator["surrogate"]:
        estimator["surrogate"] = {"use": "residual"} | estimator["surrogate"]
    return small_run(folder, estimator=estimator, reward={"differentiable": False}, **changes or {})


def new_online(seed: int = 0, **options: Any) -> OnlineSurrogate:
    options = {"replay": 2000, "learning_rate": 3e-3, "steps_per_update": 30, "batch_size": 64} | options
    return OnlineSurrogate((4, 4, 4), FEATURES, seed=seed, device=torch.device("cpu"), **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Last latents and prompts of an update: ten prompts, eight chains of each."""
    return normal((CHAINS, 4, 4, 4), torch.float32, "latents", step), torch.eye(FEATURES)[GROUPS]


def true_reward(latents: Tensor, prompts: Tensor) -> Tensor:
    """Even prompts ask for a picture, odd ones for its negative; what else prompts differ in is worth nothing."""
    wanted = normal((64,), torch.float32, "wanted") / 8
    sign = 1 - 2 * (prompts.argmax(1) % 2)
    return torch.tanh(sign * (latents.flatten(1) @ wanted)) + 0.2 * prompts.argmax(1)


def correlations(folder: Path, rate: Any, *, learn_first: bool = False, updates: int = 12) -> tuple[list[float], float]:
    """Q's correlation with a reward on every update's fresh chains, and the coefficient after the last."""
    config = surrogate_run(folder)
    state, online = TrainState(torch.zeros(2), config.train, config.estimator), new_online()
    found = []
    for step in range(updates):
        latents, prompts = batch(step)
        rewards = rate(step, latents, prompts)
        if learn_first:
            online.learn(step, latents, prompts, rewards)
        with torch.no_grad():
            scores = online.objective({"prompt": prompts[:, None]})(latents)
        found.append(state.adaptive.observe_surrogate(scores, rewards, GROUPS))
        if not learn_first:
            online.learn(step, latents, prompts, rewards)
    return found, state.propose(5).control_variate


def test_a_surrogate_learns_to_rate_chains_it_has_not_seen(tmp_path: Path) -> None:
    found, coefficient = correlations(tmp_path, lambda step, latents, prompts: true_reward(latents, prompts))
    assert found[0] == 0  # before it has seen any
    assert min(found[-4:]) > 0.8, [round(value, 2) for value in found]
    assert 0.7 < coefficient < 1.3


def noise(step: int, latents: Tensor, prompts: Tensor) -> Tensor:
    return normal((CHAINS,), torch.float32, "pure noise", step)


def test_a_reward_of_noise_leaves_the_gate_closed(tmp_path: Path) -> None:
    found, coefficient = correlations(tmp_path, noise, updates=6)
    assert max(found) < 0.3 and coefficient == 0
    # measured after it has learned from the same chains, Q would seem to follow what nothing can
    found, coefficient = correlations(tmp_path, noise, learn_first=True, updates=6)
    assert min(found) > 0.3 and coefficient > 0


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 64, 64), (16, 9, 130), (16, 3, 8, 12)], ids=str)
def test_latents_of_any_size_are_rated_smoothly(shape: tuple[int, ...]) -> None:
    regressor = Regressor(shape, 7)
    regressor.reward_std.fill_(2.0)
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (scores,) = regressor(latents, torch.ones(3, 7))
    (slope,) = torch.autograd.grad(scores.sum(), latents)
    assert scores.shape == (3,) and float(slope.flatten(1).norm(dim=1).min()) > 0


def test_training_names_all_its_randomness_and_goes_on_exactly_from_its_state() -> None:
    ones = [new_online(steps_per_update=3, replay=100) for _ in range(2)]
    torch.manual_seed(5)  # whatever the global generator is at
    before = torch.get_rng_state()
    for step in range(4):
        latents, prompts = batch(step)
        for one in ones:
            one.learn(step, latents, prompts, true_reward(latents, prompts))
        if step == 1:
            restored = new_online(steps_per_update=3, replay=100)
            restored.load_state_dict(ones[1].state_dict())
            ones[1] = restored
    assert torch.equal(before, torch.get_rng_state())
    assert len(ones[0].rewards) == 100 and torch.equal(ones[0].pictures[-CHAINS:], latents)
    other = new_online(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(*(one.regressor.parameters() for one in ones), strict=True))
    assert not torch.equal(next(other.regressor.parameters()), next(new_online().regressor.parameters()))


def test_the_gate_opens_at_its_threshold_and_a_number_has_none(tmp_path: Path) -> None:
    state = TrainState(torch.zeros(2), (config := surrogate_run(tmp_path)).train, config.estimator)
    assert state.propose(5).control_variate == 0  # nothing measured yet
    state.adaptive.agreement = [(4.0, 0.5, 1.0)]
    assert state.propose(5).control_variate == 0  # correlation .25
    state.adaptive.agreement = [(4.0, 0.5, 1.0), (4.0, 3.5, 1.0)]
    assert state.propose(5).control_variate == pytest.approx(0.5)  # correlation .5 over both
    for _ in range(6):
        state.adaptive.observe_surrogate(torch.arange(8.0), 3 * torch.arange(8.0), torch.zeros(8))
    assert len(state.adaptive.agreement) == 5 and state.propose(5).control_variate == pytest.approx(3)
    stated = surrogate_run(tmp_path, surrogate={"coefficient": 0.6}).estimator
    assert TrainState(torch.zeros(2), config.train, stated).propose(5).control_variate == 0.6


def test_the_residuals_weight_has_statistics_of_its_own(tmp_path: Path) -> None:
    config = surrogate_run(tmp_path, smoothing=0.5, weight_averaging=4)
    state = TrainState(torch.zeros(2), config.train, config.estimator)
    large, small = (TermEstimate(torch.tensor([size, 0.0]), 1.0) for size in (10.0, 2.0))
    plan = PlanShape(5, 0, 0, rest="half_order").draw(0)
    residual = dataclasses.replace(plan, residual_from=0)
    carried, left = (GradientEstimate({"half_order": term}, torch.zeros(2)) for term in (large, small))
    state.adaptive.observe(plan, carried)
    assert state.adaptive.observe(residual, left)["half_order"] == 0  # no earlier residual to compare with
    # inner product 4 over variance 1, smoothed 2, m = 4, whatever the term was when it carried the whole reward
    assert state.adaptive.observe(residual, left)["half_order"] == pytest.approx(2 / (2 + 1 / 4))


def test_a_surrogate_alone_leaves_theta_as_it_is_until_it_is_trusted(tmp_path: Path) -> None:
    engine = Engine(surrogate_run(tmp_path, rest="none", surrogate={"steps_per_update": 5, "threshold": 0.1}))
    state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
    online, thetas = new_run_online(engine), []
    for correlation in (0.0, 0.0, 0.9):
        state.adaptive.agreement = [(1.0, correlation, 1.0)]
        row = update(engine, state, None, Process(), online)
        thetas.append(state.theta.detach().clone())
        assert ("first_order_norm" in row) == (row["surrogate_coefficient"] > 0) == (correlation > 0)
    assert torch.equal(thetas[1], engine.model.initial_theta) and not torch.equal(thetas[2], thetas[1])
    assert GradientEstimate({}, torch.zeros(2)).noise_shares({}) == {}


def test_a_surrogate_that_is_the_reward_makes_the_update_full_backpropagation(tmp_path: Path) -> None:
    """R - Q is 0 then, so half order carries nothing; to float32's rounding."""
    keys = {"name": "digits", "coefficient": 1.0}
    full = small_run(tmp_path, estimator=FULL | {"rest": "none"})
    thetas, rows = [], []
    for config in (full, surrogate_run(tmp_path, surrogate=keys, half_order={"weight": 1.0})):
        engine = Engine(config)
        state = TrainState(engine.model.initial_theta, config.train, config.estimator)
        rows.append(update(engine, state, None, Process()))
        thetas.append(state.theta.detach())
    torch.testing.assert_close(thetas[0], thetas[1], atol=1e-6, rtol=0)
    assert rows[1]["half_order_norm"] < 1e-4 * rows[1]["first_order_norm"]
    assert rows[1]["surrogate_correlation"] == pytest.approx(1)


def test_perturbation_rollouts_rate_what_a_named_surrogate_leaves(tmp_path: Path) -> None:
    """With Q = R the rollouts see nothing but rounding; before the gate opens, the whole reward."""
    config = surrogate_run(tmp_path, surrogate={"name": "digits"}, rest="zeroth_order")
    engine = Engine(config)
    state = TrainState(engine.model.initial_theta, config.train, config.estimator)
    rows = [update(engine, state, None, Process()) for _ in range(2)]
    assert [row["surrogate_coefficient"] for row in rows] == [0, pytest.approx(1)]
    assert rows[0]["zeroth_order_norm"] > 1e3 * rows[1]["zeroth_order_norm"]
    assert "first_order_norm" not in rows[0] and rows[1]["first_order_norm"] > 0


def three_updates(engine: Engine, process: Process) -> tuple[TrainState, OnlineSurrogate, list]:
    state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
    online = new_run_online(engine)
    return state, online, [update(engine, state, None, process, online) for _ in range(3)]


def test_an_updates_own_rewards_have_no_say_in_its_surrogate(tmp_path: Path) -> None:
    """The last update's rewards are replaced: its coefficient and first order stay, what comes after does not."""
    config = surrogate_run(tmp_path, surrogate={"steps_per_update": 5, "threshold": 0.0})
    engine, results = Engine(config), []
    for scale in (1.0, -3.0):
        state, online = TrainState(engine.model.initial_theta, config.train, config.estimator), new_run_online(engine)
        state.adaptive.agreement = [(1.0, 0.5, 1.0)]  # open
        reward = engine.rewards.rewards["digits"]
        update(engine, state, None, Process(), online)
        engine.rewards.rewards["digits"] = lambda *given, reward=reward, scale=scale: scale * reward(*given)
        row = update(engine, state, None, Process(), online)
        engine.rewards.rewards["digits"] = reward
        results.append((row["surrogate_coefficient"], row["first_order_norm"], state.propose(5).control_variate))
    assert results[0][:2] == results[1][:2] and results[0][0] != 0 and results[0][1] > 0
    assert results[0][2] != results[1][2]


def new_run_online(engine: Engine) -> OnlineSurrogate:
    online = online_surrogate(engine)
    assert online is not None
    return online


def test_heads_are_scored_before_they_learn_from_the_same_chains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else noise would be explained, and trusted: see test_a_head_that_learned_first_seems_to_explain_noise."""
    engine = Engine(surrogate_run(tmp_path, surrogate={"use": "switch", "steps_per_update": 5}))
    online, learn, order = new_run_online(engine), OnlineSurrogate.learn, list[str]()
    state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
    observe = Trust.observe
    monkeypatch.setattr(Trust, "observe", lambda *given: (order.append("scored"), observe(*given)))
    monkeypatch.setattr(OnlineSurrogate, "learn", lambda *given: (order.append("learned"), learn(*given)))
    for _ in range(2):
        update(engine, state, None, Process(), online)
    assert order == ["scored", "learned"] * 2


@pytest.mark.parametrize("sampling_size", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_two_processes_learn_the_same_surrogate_as_one(tmp_path: Path, sampling_size: int | None) -> None:
    train = {"chains": 8, "chunk_size": 2, "sampling_size": sampling_size}
    config = surrogate_run(tmp_path, {"train": train}, surrogate={"steps_per_update": 5, "coefficient": 0.7})
    alone = three_updates(Engine(config), Process())
    assert alone[2][0]["surrogate_correlation"] == 0  # measured before Q learned from these chains, its first
    engines = [Engine(config) for _ in range(2)]
    pair = shared(2, lambda rank, reduce: three_updates(engines[rank], Process(rank, 2, reduce)))
    for state, online, rows in pair:
        assert torch.equal(state.theta, alone[0].theta) and state.adaptive.agreement == alone[0].adaptive.agreement
        pairs = zip(online.regressor.state_dict().values(), alone[1].regressor.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        assert rows[2]["surrogate_correlation"] == alone[2][2]["surrogate_correlation"]


def test_an_interrupted_run_with_a_surrogate_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    keys = {"surrogate": {"threshold": 0.0, "steps_per_update": 5, "replay": 20}}
    whole = train_here(surrogate_run(tmp_path, {"name": "whole"}, **keys))
    broken = surrogate_run(tmp_path, {"name": "broken", "train": {"checkpoint_every": 2}}, **keys)
    with pytest.raises(KeyboardInterrupt):
        train_here(broken, stop_after=3)
    assert outcome(train_here(broken, resume=True).path) == outcome(whole.path)
    summary = whole.load_summary()
    said = describe_results(whole)
    assert f"used in {summary['surrogate']['share_of_updates']:.0%} of updates" in said
    assert f"surrogate: correlation {summary['surrogate']['correlation']:.2f}" in said


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {},
            ["half order what it leaves", "weight auto", "biased towards the surrogate's gradient until", "below 0.3"],
        ),
        ({"half_order": {"weight": 1}}, ["weight 1, so the sum is unbiased"]),
        ({"half_order": {"weight": 0.5}}, ["biased by what it misses"]),
        ({"rest": "none"}, ["biased towards its gradient", "theta stays as it is"]),
    ],
)
def test_the_plan_says_what_it_estimates(tmp_path: Path, keys: dict[str, Any], words: list[str]) -> None:
    said = describe_plan(surrogate_run(tmp_path, **keys))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rest": "zeroth_order"}, ["'online'", "rollout actors", "rest: half_order", "place: cover"]),
        ({"first_order": {"steps": 2}}, ["every step", "first_order.steps 2", "first_order.steps to all"]),
        ({"first_order": {"steps": 1}, "truncation": "random"}, ["every step", "'random'", "russian_roulette"]),
        ({"surrogate": {"options": {"a": 1}}}, ["'online' takes no options", "'a'", "leave them out"]),
        ({"surrogate": {"coefficient": 0}}, ["estimator.surrogate.coefficient", "'auto'", "greater than 0"]),
        ({"surrogate": {"windows": 2}}, ["estimator.surrogate.windows", "no such key", "window"]),
    ],
    ids=str,
)
def test_a_surrogate_that_cannot_work_is_refused(tmp_path: Path, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        surrogate_run(tmp_path, **keys)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_chains_without_a_baseline_cannot_say_what_a_surrogate_is_worth(tmp_path: Path) -> None:
    alone = {"train": {"chains_per_prompt": 1}}
    with pytest.raises(UserError, match=r"share a baseline, found 1 of a prompt; raise train.chains_per_prompt"):
        surrogate_run(tmp_path, alone, rest="none")
    surrogate_run(tmp_path, alone, rest="none", surrogate={"coefficient": 0.5})


def test_first_order_needs_a_surrogate_that_is_differentiable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"surrogate.name 'digits_judge' is black-box .*surrogate.name: online"):
        check_first_order(surrogate_run(tmp_path, surrogate={"name": "digits_judge"}))
    with pytest.raises(UserError, match=r"black-box .*first_order.steps is all; .*estimator.preset: auto"):
        check_first_order(surrogate_run(tmp_path, surrogate=None))
    check_first_order(surrogate_run(tmp_path))


def rated(latents: Tensor, prompts: Tensor) -> Tensor:  # [3, B]
    """A smooth reward, the same as right or wrong, and one that fails in every third chain of the first prompts."""
    smooth = true_reward(latents, prompts)
    failing = torch.where((torch.arange(CHAINS) % 3 == 0) & (GROUPS < 5), torch.nan, -2 * smooth)
    return torch.stack([smooth, (smooth - 0.2 * prompts.argmax(1) > 0).float(), failing])


def explained_by(rate: Callable[[int, Tensor, Tensor], Tensor], *, updates: int, learn_first: bool = False) -> Trust:
    """The trust in a head for each of a reward's parts [h, B] after so many updates."""
    heads = len(rate(0, *batch(0)))
    trust, online = Trust(heads), new_online(heads=heads)
    for step in range(updates):
        latents, prompts = batch(step)
        rewards = rate(step, latents, prompts)
        if learn_first:
            online.learn(step, latents, prompts, rewards)
        trust.observe(online.scores(latents, prompts), rewards, GROUPS.tolist())
        if not learn_first:
            online.learn(step, latents, prompts, rewards)
    return trust


def test_each_reward_has_a_head_that_learns_it_whatever_it_is() -> None:
    """Of 0 and 1 with ties, too, and what is NaN teaches nothing and is not measured."""
    trust = explained_by(lambda step, latents, prompts: rated(latents, prompts), updates=20)
    assert min(trust.measured()[0].tolist()) > 0.6, trust.measured()
    assert trust.trusted == [True] * 3


def test_minibatches_are_read_with_noise() -> None:
    """Without, a network of this size fits eighty chains of pure noise nearly exactly."""
    latents, prompts = batch(0)
    rewards = noise(0, latents, prompts)
    online = new_online(steps_per_update=300)
    online.learn(0, latents, prompts, rewards)
    with torch.no_grad():
        missed = (online.scores(latents, prompts)[0] - rewards).square().mean() / rewards.var()
    assert float(missed) > 5e-4


def test_what_is_nan_leaves_the_head_as_if_the_chain_had_not_been_rated() -> None:
    latents, prompts = batch(0)
    rewards = rated(latents, prompts)[1:]
    ones = [new_online(heads=2) for _ in range(2)]
    for one, wrong in zip(ones, (torch.nan, torch.inf), strict=True):
        one.learn(0, latents, prompts, torch.where(rewards.isnan(), wrong, rewards))
    values = [list(one.regressor.state_dict().values()) for one in ones]
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*values, strict=True))
    known = rewards[1][~rewards[1].isnan()]
    torch.testing.assert_close(ones[0].regressor.reward_mean[1], known.mean())
    torch.testing.assert_close(ones[0].regressor.reward_std[1], known.std(correction=0))
    scores = torch.randn(2, CHAINS, generator=torch.Generator().manual_seed(4))
    squares = torch.cat([(scores[0] - rewards[0]).square(), (scores[1] - rewards[1])[~rewards[1].isnan()].square()])
    torch.testing.assert_close(masked_mse(scores, rewards), squares.mean())
    silent = new_online(heads=2)
    silent.learn(0, latents, prompts, torch.full_like(rewards, torch.nan))
    assert not silent.scores(latents, prompts).any()  # nothing is known, and nothing has become NaN


def test_rewards_that_are_all_equal_are_no_difference_to_learn() -> None:
    """Though their mean, and so what they differ from it by, is rounded."""
    latents, prompts = batch(0)
    values = torch.tensor([0.1, 1 / 3, 1234.567, -0.7, 0.0])[:, None].expand(-1, 77)
    regressor = new_online(heads=5).regressor
    assert not regressor.standardise(latents[:77], prompts[:77], values).any() and not regressor.reward_std.any()
    torch.testing.assert_close(regressor(latents[:77], prompts[:77]), values)


def test_a_head_that_learned_first_seems_to_explain_noise() -> None:
    rate = lambda step, latents, prompts: noise(step, latents, prompts)[None]  # noqa: E731
    fresh, learned = (explained_by(rate, updates=7, learn_first=first) for first in (False, True))
    assert float(fresh.measured()[0]) < 0.1 < 0.2 < float(learned.measured()[0])


def test_what_tells_prompts_apart_is_not_trusted() -> None:
    """Q knows that prompts differ, by far the most of the spread, and that explains nothing within a prompt."""
    trust = Trust(1)
    for step in range(9):
        _, prompts = batch(step)
        trust.observe(prompts.argmax(1)[None], (prompts.argmax(1) + noise(step, *batch(step)))[None], GROUPS.tolist())
    explained, error = (float(value) for value in trust.measured())
    assert abs(explained) < 3.5 * error < 0.3 and trust.trusted == [False]  # of all the spread it would be .9


FEW: dict[str, Any] = {"train": {"chains": 4, "chains_per_prompt": 2, "chunk_size": 2}, "sampler": {"steps": 3}}


def test_a_head_reads_the_base_denoisers_middle(tmp_path: Path) -> None:
    """First order passes through it to theta, and what it has read is kept in place of latents."""
    keys = {"steps_per_update": 5, "use": "residual", "coefficient": 0.7, "features": "denoiser"}
    engine = Engine(surrogate_run(tmp_path, {"model": {"name": "digits", "path": None}} | FEW, surrogate=keys))
    _, online, rows = three_updates(engine, Process())
    chains = engine.train_chains(0, range(4))
    seen = engine.model.features(chains.x_start, chains.conditioning)
    assert online.pictures.shape == (3 * len(engine.groups()), *seen.shape[1:])
    assert rows[0]["first_order_norm"] == 0 < min(row["first_order_norm"] for row in rows[1:])
    with torch.no_grad():
        scores = online.heads(chains.conditioning)(chains.x_start)
        torch.testing.assert_close(scores, online.scores(seen, online.features(chains.conditioning)))


SWITCH = {
    "rest": "none",
    "half_order": {"score": "forward", "baseline": "running", "weight": 1.0},
    "surrogate": {"use": "switch", "steps_per_update": 5},
}


def by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are trusted from the third update on, and then not, and again: as the measured updates go."""
    monkeypatch.setattr(Trust, "trusted", property(lambda self: [len(self.sums) % 2 == 1] * len(self.noise[0])))


def scored_before(online: OnlineSurrogate, weights: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The head's scores, of which those of an update are asked for before it has learned."""

    def scores(pictures: Tensor, prompts: Tensor) -> Tensor:
        assert all(torch.equal(a, b) for a, b in zip(online.regressor.parameters(), weights, strict=True))
        return OnlineSurrogate.scores(online, pictures, prompts)

    return scores


def test_first_order_switches_to_heads_that_are_trusted_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_turns(monkeypatch)
    engine = Engine(surrogate_run(tmp_path, **SWITCH))
    state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
    online, rows = new_run_online(engine), []
    for step in range(4):
        before = [value.clone() for value in online.regressor.parameters()]
        monkeypatch.setattr(online, "scores", scored_before(online, before))
        rows.append(update(engine, state, None, Process(), online))
        assert step == 0 or not torch.equal(before[0], next(online.regressor.parameters()))
    assert ["first_order_norm" in row for row in rows] == [False, False, True, False]
    assert ["half_order_norm" in row for row in rows] == [True, True, False, True]
    assert [row["surrogate_trusted_digits"] for row in rows] == [False, True, False, True]
    assert "surrogate_explained_digits" not in rows[0] and engine.config.black_box == ["digits"]


def test_a_run_is_the_same_in_two_processes_and_resumed_around_a_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_turns(monkeypatch)
    train = {"checkpoint_every": 1, "iterations": 4}
    config = surrogate_run(tmp_path, {"train": train, "name": "whole"}, **SWITCH)
    whole = train_here(config)
    engines = [Engine(config) for _ in range(2)]
    pair = shared(2, lambda rank, reduce: three_updates(engines[rank], Process(rank, 2, reduce)))
    alone = three_updates(Engine(config), Process())
    for state, online, rows in pair:
        assert torch.equal(state.theta, alone[0].theta) and rows[2]["first_order_norm"] > 0
        assert online.trust is not None and alone[1].trust is not None
        assert online.trust.state_dict()["means"] == alone[1].trust.state_dict()["means"]
        assert all(torch.equal(a, b) for a, b in zip(online.trust.sums, alone[1].trust.sums, strict=True))
    broken = surrogate_run(tmp_path, {"train": train, "name": "broken"}, **SWITCH)
    for stop in (2, 3):  # before and after the update that first order carries
        with pytest.raises(KeyboardInterrupt):
            train_here(broken, stop_after=stop, resume=stop == 3)
    assert outcome(train_here(broken, resume=True).path) == outcome(whole.path)
    said = describe_results(whole)
    assert "surrogate of digits: explains" in said and "trusted in 50% of updates" in said


def test_a_reward_is_asked_twice_once_and_a_replaced_score_teaches_nothing(tmp_path: Path) -> None:
    keys = {"reward": {"differentiable": False, "invalid": 0.0}}
    config = surrogate_run(tmp_path, {"evaluation": {"chains": 2, "chunk_size": 2}}, **SWITCH)
    config = small_run(tmp_path, estimator=config.estimator.model_dump(exclude_unset=True), **keys)
    engine, calls = Engine(config), list[int]()
    reward = engine.rewards.rewards["digits"]

    def failing(images: Tensor, *told: Any) -> Tensor:
        calls.append(len(images))
        scores = reward(images, *told).clone()
        scores[::2] = torch.nan
        return scores

    engine.rewards.rewards["digits"] = failing
    state, online = TrainState(engine.model.initial_theta, config.train, config.estimator), new_run_online(engine)
    counts = []
    for _ in range(3):
        calls.clear()
        row = update(engine, state, None, Process(), online)
        counts.append(sum(calls))
    assert counts == [2 * len(engine.groups()), len(engine.groups()), len(engine.groups())]
    assert online.rewards.isnan()[:, 0].sum() * 2 == len(online.rewards) and row["reward_invalid"] == counts[1] / 2
    assert online.trust is not None and bool(torch.isfinite(torch.stack(online.trust.sums)).all())
    assert float(online.trust.sums[-1][0]) == counts[1] / 2  # chains that were measured
