"""What a run's guards see, and that it ends, keeps and averages as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.config.guards import GuardsConfig
from rlr_ray.core.kl import divergence_by_step
from rlr_ray.errors import UserError
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.rewards.scores import Evaluation
from rlr_ray.train import update as one_update
from rlr_ray.train.engine import Engine
from rlr_ray.train.guards import Guards
from rlr_ray.train.held_out import evaluate, standardised
from rlr_ray.train.process import ALONE
from rlr_ray.train.sampling import penalty_of
from rlr_ray.train.state import TrainState
from tests.runs import short_run, small_run, train_here

NOISE = torch.linspace(-1, 1, 16)  # of paired differences; their standard error is .16
TOTAL = WeightedSum(("own",), (1.0,), ((0.0, 1.0),))


def at(reward: float, judge: float, kl: float = 0.0, noise: Tensor = NOISE) -> Evaluation:
    scores = {"own": reward + noise, "judge": judge - noise}
    return Evaluation(scores, torch.zeros(1, 3, 2, 2), torch.full((1, 4), kl), torch.zeros(4, 2), torch.zeros(4))


BEFORE = at(0.0, 0.0, noise=torch.zeros(16))


def guards(**keys: Any) -> Guards:
    return Guards(GuardsConfig(step_back=False, **keys), TOTAL, ["judge"], BEFORE, torch.zeros(3))


@pytest.mark.parametrize(
    ("reward", "judge", "warns"),
    [(1.0, -1.0, True), (1.0, -0.2, False), (0.2, -1.0, False), (-1.0, -1.0, False), (1.0, 1.0, False)],
)
def test_a_reward_is_gamed_if_it_rises_while_a_judge_falls_beyond_their_errors(
    reward: float, judge: float, warns: bool
) -> None:
    watching = guards(patience=1)
    watching.note(5, at(reward, judge), torch.ones(3))
    assert (watching.warning is not None) == warns == (watching.stopped is not None)
    assert not warns or ("judge fell by 1 +-" in str(watching.stopped) and "after update 5" in str(watching.stopped))


def test_a_judge_is_compared_with_its_highest_and_the_best_reward_is_kept() -> None:
    watching = guards(patience=2)
    for update, (reward, judge) in enumerate([(1.0, 3.0), (2.0, 2.0), (2.1, 3.1), (4.0, 1.0), (5.0, 0.5)]):
        watching.note(update, at(reward, judge, noise=torch.zeros(16)), torch.full((3,), float(update)))
        assert watching.gamed == (0, 1, 0, 1, 2)[update]
    assert "since update 2" in str(watching.stopped)
    assert watching.best.update == 4 and watching.best.theta.tolist() == [4.0] * 3
    copy, other = guards(patience=2), guards(patience=3)
    for loaded in (copy, other):
        loaded.load_state_dict(watching.state_dict())
        assert loaded.best.update == 4
    assert copy.stopped == watching.stopped and copy.gamed == 2
    for one in (watching, copy):  # the judge's peak is remembered, not that of the start: it fell since, if not below 0
        one.note(5, at(6.0, 0.5, noise=torch.zeros(16)), torch.zeros(3))
    assert copy.gamed == watching.gamed == 3 and "since update 2" in str(copy.warning)
    assert other.stopped is None


def test_the_divergence_stops_a_run() -> None:
    watching = guards(kl_stop=0.5)
    watching.note(1, at(1.0, 1.0, kl=0.4), torch.zeros(3))
    assert watching.stopped is None
    watching.note(2, at(1.0, 1.0, kl=0.6), torch.zeros(3))
    assert "KL to the base model 0.6" in str(watching.stopped)


def test_what_is_beyond_the_limit_is_not_the_best_and_the_last_evaluation_stops_nothing() -> None:
    watching = guards(kl_stop=0.5)
    watching.note(1, at(1.0, 5.0, kl=0.6), torch.zeros(3), last=True)
    assert watching.best.update == 0 and watching.stopped is None


def run(folder: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return train_here(small_run(folder, **changes), resume=resume).load_summary()


EVERY = {"evaluation": {"every": 1, "judge": {"name": "digits_judge"}}}


def test_a_run_stops_and_stays_stopped(tmp_path: Path) -> None:
    summary = run(tmp_path, guards={"kl_stop": 1e-9}, **EVERY)
    assert summary["steps"] == 1 and "kl_stop" in summary["stopped"] and "stopped early" in summary["warnings"][0]
    again = run(tmp_path, resume=True, guards={"kl_stop": 1e-9}, **EVERY)
    assert again["theta_sha256"] == summary["theta_sha256"] and again["steps"] == 1
    on = run(tmp_path, resume=True, guards={"kl_stop": 1e9}, **EVERY)
    assert on["steps"] == 4 and on["stopped"] is None


def test_the_best_is_what_a_run_leaves(tmp_path: Path) -> None:
    """A learning rate that destroys the model: the base model is the best, is left, and that is said."""
    keys = {"train": {"learning_rate": 30.0, "iterations": 2}, "guards": {"keep": "best"}, "model": {"name": "digits"}}
    summary = run(tmp_path, evaluation={"every": 1, "chains": 8}, **keys)
    assert summary["kept_update"] == summary["best_update"] < summary["steps"]
    assert summary["reward_after"] == summary["reward_before"] > summary["reward_last"]
    assert summary["kept_update"] == 0 and any("no evaluation beat the start" in text for text in summary["warnings"])


def test_a_penalty_holds_the_model_back(tmp_path: Path) -> None:
    free = run(tmp_path, name="free")
    bound = run(tmp_path, name="bound", guards={"kl_penalty": 1000.0, "kl_steps": "all"})
    assert bound["kl"] < free["kl"] / 3


@pytest.mark.parametrize(("kl_steps", "steps"), [(None, 2), (1, 1), (3, 3), ("all", 4)])
def test_a_penalty_is_measured_and_paid_at_as_many_steps_as_the_recipe_asks(
    tmp_path: Path, kl_steps: int | str | None, steps: int
) -> None:
    config = small_run(tmp_path, guards={"kl_penalty": 1.0, "kl_steps": kl_steps})
    engine = Engine(config)
    drawn = {tuple(penalty_of(engine, number).steps) for number in range(8)}
    assert {len(set(one)) for one in drawn} == {steps}
    plans, chains = engine.plans(0), config.train.chains
    free = small_run(tmp_path).cost(plans)
    assert config.cost(plans) == (free[0] + 2 * steps * chains, free[1] + steps * chains)


def test_the_average_is_diffusers_own(tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    config = short_run(tmp_path, guards={"ema": 0.8})
    state = TrainState(torch.zeros(3), config.train, config.estimator, config.guards)
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(3))], decay=0.8, use_ema_warmup=False)
    for update in range(12):
        with torch.no_grad():
            state.theta += 1.0 + update
        state.step += 1
        state._average()
        theirs.step([state.theta])
    torch.testing.assert_close(state.theta_to_save, theirs.shadow_params[0])


def test_an_evaluation_measures_what_it_says(tmp_path: Path) -> None:
    """Divergence and diversity at another theta, computed anew."""
    engine = Engine(short_run(tmp_path, evaluation={"chains": 8, "pictures": 8}))
    theta = engine.model.initial_theta + 0.05
    found = evaluate(engine, theta)
    halves = [engine.sample(theta, range(first, first + 4)) for first in (0, 4)]
    arguments = (engine.sampler, theta, engine.model.initial_theta)
    expected = torch.cat([divergence_by_step(*arguments, trajectory) for trajectory, _ in halves], dim=1)
    torch.testing.assert_close(found.divergence_by_step, expected)
    torch.testing.assert_close(found.divergence, expected.sum(0))
    images = torch.cat([images for _, images in halves])
    features = engine.judges.rewards["digits_judge"].features(images)
    pairs = [(own[i] - own[j]).norm() for own in (features[0::2], features[1::2]) for i in range(4) for j in range(i)]
    assert found.diversity == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"guards": {"patience": 2}}, "nothing is evaluated during the run; set evaluation.every"),
        ({"guards": {"patience": 2}, "evaluation": {"every": 1, "judge": None}}, "add evaluation.judges"),
        ({"guards": {"kl_penalty": 1.0}, "sampler": {"eta": 0}, "estimator": {"preset": "es"}}, "their KL is infinite"),
        ({"guards": {"kl_penalty": 1.0, "kl_steps": 9}}, "kl_steps is 9; allowed: 1 to 5, or all"),
        ({"guards": {"kl_steps": 3}}, "guards.kl_penalty is 0; set it too"),
    ],
)
def test_guards_that_could_not_guard_are_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        short_run(tmp_path, **keys)


def test_standards_are_those_of_the_base_models_evaluation(tmp_path: Path) -> None:
    reward = {"name": "digits", "normalize": True}
    engine = Engine(short_run(tmp_path, reward=reward, evaluation={"chains": 6, "judge": None}))
    total = standardised(engine)
    scores = evaluate(engine, engine.model.initial_theta).scores["digits"].double()
    assert total.standards == ((pytest.approx(float(scores.mean())), pytest.approx(float(scores.std()))),)


def test_an_update_maximises_the_standardised_score_in_every_term(tmp_path: Path) -> None:
    engine = Engine(small_run(tmp_path))
    total, rows = WeightedSum(("digits",), (1.0,), ((-3.0, 2.0),)), []
    for maximised in (None, total):
        state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
        rows.append(one_update.update(engine, state, None, ALONE, total=maximised))
    raw, standardised_row = rows
    assert standardised_row["reward_mean"] == pytest.approx((raw["reward_mean"] + 3) / 2)
    for term in ("first_order", "half_order", "zeroth_order"):
        assert standardised_row[f"{term}_norm"] == pytest.approx(raw[f"{term}_norm"] / 2, rel=1e-3)


def test_held_out_chains_are_no_training_chains(tmp_path: Path) -> None:
    engine = Engine(small_run(tmp_path, train={"chains": 8}))
    apart = engine.start(*engine.held_out(range(8)))[0].flatten(1)
    trained = torch.cat([engine.train_chains(step, range(8)).x_start.flatten(1) for step in range(3)])
    assert torch.cdist(apart, trained).min() > 0.1 * apart.shape[1] ** 0.5  # as of two draws, about 1.4 times that root
