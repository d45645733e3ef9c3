"""What needs no gradient is the same wherever it ran: sent as bytes to another engine, back in any order."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.config.describe import describe_plan
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.rewards.mixture import Tally
from rlr_ray.train.engine import Engine, Request, RolloutBatch
from rlr_ray.train.held_out import HeldOutRequest, evaluate
from rlr_ray.train.online import online_surrogate
from rlr_ray.train.process import ALONE
from rlr_ray.train.sampling import ChainRequest, request_ahead, request_chains
from rlr_ray.train.state import Sampling, TrainState
from rlr_ray.train.update import update
from tests.runs import RECIPE, shared_engine, small_run, train_here

BLACK = {"reward": {"differentiable": False}}
PENALTY = {"guards": {"kl_penalty": 1.0, "kl_steps": "all"}}
LEARNS = {"steps_per_update": 2, "batch_size": 4}
# By preset: what else is set, and which chains come from elsewhere.
AHEAD: dict[str, Any] = {"train": {"ahead": 1}}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "awm": ({}, True),
    "ddpo": (PENALTY, True),
    "branches": ({"estimator": {"half_order": {"branch_steps": 2}}} | PENALTY, True),
    "rlr": ({"train": {"sampling_size": 4}}, True),
    "alignprop-random": ({"train": {"sampling_size": 4}}, True),
    "es": ({}, True),
    "black-box": (BLACK | {"estimator": {"surrogate": LEARNS}}, True),
    "surrogate": (BLACK | {"estimator": {"surrogate": LEARNS | {"threshold": 0.0}}}, True),
    "full_bp": ({}, False),
    "branches by group": ({"estimator": {"half_order": {"baseline": "group"}}}, True),
}


class Elsewhere:
    """`Rollouts` by another engine: what goes there and comes back is pickled, and comes in the opposite order."""

    def __init__(self, config: RunConfig):
        self.engine, self.sent = shared_engine(config, "elsewhere"), dict[str, int]()

    def __call__(self, request: Request, chunks: Sequence[range]) -> RolloutBatch:
        asked, back = pickle.loads(pickle.dumps(request)), []
        for chunk in reversed(chunks):
            message = pickle.dumps(asked.run(self.engine, chunk))
            kind = type(request).__name__
            self.sent[kind] = self.sent.get(kind, 0) + len(message)
            back.append(pickle.loads(message))
        return RolloutBatch(back)


def config_of(preset: str, changes: dict[str, Any]) -> RunConfig:
    estimator = {"preset": preset.split()[0], "zeroth_order": {"count": 2, "chunk_size": 1}}
    keys = merge({"estimator": estimator, "reward": RECIPE["reward"]}, changes)
    small = small_run(Path("nowhere"), sampler={"steps": 4}, train={"iterations": 2})
    base = small.model_dump(exclude={"estimator", "rewards"})
    return RunConfig.model_validate(merge(base, keys))


def theta_after(config: RunConfig, elsewhere: Elsewhere | None, updates: int = 2) -> Tensor:  # [P]
    engine = shared_engine(config)
    state, online = TrainState(engine.model.initial_theta, config.train, config.estimator), online_surrogate(engine)
    for _ in range(updates):
        update(engine, state, elsewhere, ALONE, online)
    return state.theta.detach()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("preset", "ahead"), [*((preset, 0) for preset in CASES), ("rlr", 1), ("ddpo", 1)])
def test_chains_from_elsewhere_leave_the_same_bits(preset: str, ahead: int) -> None:
    changes, some = CASES[preset]
    config = config_of(preset, merge(changes, AHEAD) if ahead else changes)
    elsewhere = Elsewhere(config)
    assert torch.equal(theta_after(config, elsewhere, 2 + ahead), theta_after(config, None, 2 + ahead))
    assert ("ChainRequest" in elsewhere.sent) == some


def test_each_chunk_is_sampled_by_its_own_plan() -> None:
    """Random truncation draws one for each."""
    config = config_of("alignprop-random", {"train": {"chains": 16, "chains_per_prompt": 2, "chunk_size": 2}})
    engine = Engine(config)
    plans = engine.plans(0)
    request = ChainRequest(0, plans, engine.model.initial_theta)
    ready = [request.ready(c, request.chains(engine, c, Tally()))[0] for c in range(len(plans))]
    assert ready == plans and len(set(map(str, plans))) > 1


def test_a_chain_of_the_forward_term_comes_back_as_its_last_latent_and_little_else() -> None:
    config = config_of("awm", {"train": {"chains": 40, "chains_per_prompt": 20, "chunk_size": 20}})
    elsewhere = Elsewhere(config)
    theta_after(config, elsewhere, updates=1)
    latent = torch.Size(elsewhere.engine.model.latent_shape).numel() * 4  # bytes
    assert latent < elsewhere.sent["ChainRequest"] / 40 < latent + 60


def test_an_evaluation_from_elsewhere_is_the_same() -> None:
    """Scores, judges, divergence, features and pictures; also of an uneven last chunk."""
    keys = {"evaluation": {"chains": 7, "chunk_size": 3, "pictures": 4, "judge": {"name": "digits_judge"}}}
    config = small_run(Path("nowhere"), **keys)
    engine, elsewhere = Engine(config), Elsewhere(config)
    theta = engine.model.initial_theta + 0.01
    here, there = vars(evaluate(engine, theta)), vars(evaluate(engine, theta, rollouts=elsewhere))
    for name, value in here.items():
        if isinstance(value, dict):
            assert value.keys() == there[name].keys()
            assert all(torch.equal(value[label], there[name][label]) for label in value)
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(there[name])), name
    assert len(here["scores"]["digits"]) == 7 and len(here["images"]) == 4
    assert HeldOutRequest(theta).name(range(3, 6)) == "held-out chains 3 to 5"


def test_judges_leave_an_actors_device_after_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    engine: Any = SimpleNamespace(device=torch.device("cpu"), judges=SimpleNamespace(to=done.append))
    monkeypatch.setattr("rlr_ray.train.held_out._measured", lambda *asked: done.append("measured"))
    HeldOutRequest(torch.zeros(1)).run(engine, range(2))
    assert done == ["measured", torch.device("cpu")]


def test_replaced_scores_of_chains_from_elsewhere_are_counted_and_teach_a_surrogate_nothing() -> None:
    """The reward is not finite for the first chain of each call, and counts as -9."""
    reward = {"name": "tests.train.test_sampling:first_is_lost", "differentiable": False, "invalid": -9.0}
    changes = {"estimator": {"surrogate": LEARNS}, "train": {"chunk_size": 4}, "reward": reward}
    config = config_of("black-box", changes)
    engine, elsewhere = Engine(config), Elsewhere(config)
    rows, kept = [], []
    for rollouts in (None, elsewhere):
        state, online = TrainState(engine.model.initial_theta, config.train, config.estimator), online_surrogate(engine)
        rows.append(update(engine, state, rollouts, ALONE, online))
        kept.append(online.rewards if online else torch.empty(0))
    assert rows[0]["reward_invalid"] == rows[1]["reward_invalid"] == 2  # once more, to see whether the reward repeats
    assert torch.equal(kept[0].isnan(), kept[1].isnan()) and int(kept[0].isnan().sum()) == 1


def first_is_lost(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3)).index_fill(0, torch.tensor(0), torch.nan)


def test_ahead_an_update_has_the_chains_of_the_theta_before_its_own() -> None:
    """Asked for one update early, and not asked for again; the first and the last of a run have none to spare."""
    config = config_of("awm", merge(AHEAD, {"train": {"iterations": 3}}))
    engine, elsewhere, thetas = Engine(config), Elsewhere(config), list[Tensor]()
    asked: list[tuple[int, Tensor]] = []

    def watched(request: Any, chunks: Sequence[range]) -> RolloutBatch:
        asked.append((request.step, request.theta))
        return elsewhere(request, chunks)

    state, rows = TrainState(engine.model.initial_theta, config.train, config.estimator), list[dict[str, Any]]()
    for _ in range(3):
        thetas.append(state.theta.detach().clone())
        rows.append(update(engine, state, watched, ALONE))
    assert [row["chains_behind"] for row in rows] == [0, 1, 1]
    assert [step for step, _ in asked] == [0, 1, 2]
    for (_, theta), at in zip(asked, (0, 0, 1), strict=True):
        assert torch.equal(theta, thetas[at])


def test_chains_ahead_are_left_out_when_the_plan_has_changed_or_theta_stepped_back() -> None:
    config = config_of("ddpo", AHEAD)
    engine, cancelled = Engine(config), list[int]()
    state = TrainState(engine.model.initial_theta, config.train, config.estimator)
    now = Sampling(state.theta.detach().clone(), None, 0.0, ())
    total = engine.rewards.weighted_sum()

    def asked(request: Any, chunks: Sequence[range]) -> RolloutBatch:
        return RolloutBatch([], cancel=lambda: cancelled.append(request.step))

    request_ahead(engine, state, now, [0, 1], asked, total)
    assert state.pending is not None
    state.step = 1
    same, state.pending = state.pending, state.pending
    assert (
        request_chains(engine, state, now, ALONE, asked, total).batch is same
        and state.pending is None
        and not cancelled
    )
    state.pending, state.sampling = same, replace(now, trusted=(0,))  # as if a surrogate had been trusted then
    assert not request_chains(engine, state, now, ALONE, asked, total).behind and cancelled == [1]
    state.pending = same
    state._return_to(state.initial_theta)
    assert not request_chains(engine, state, now, ALONE, asked, total).behind and cancelled == [1, 1]


@pytest.mark.parametrize("preset", ["awm", "ddpo"])
def test_a_run_that_samples_ahead_goes_on_exactly(tmp_path: Path, preset: str) -> None:
    config = resolve(config_of(preset, merge(AHEAD, {"train": {"iterations": 4}, "output_dir": str(tmp_path)})))
    whole = train_here(config).load_summary()["theta_sha256"]
    cut = config.model_copy(update={"name": "cut"})
    with pytest.raises(KeyboardInterrupt):
        train_here(cut, stop_after=2)
    assert train_here(cut, resume=True).load_summary()["theta_sha256"] == whole


def test_a_plan_says_what_sampling_ahead_makes_of_it() -> None:
    for preset, words in (("ddpo", "half order weighs each step by its ratio"), ("awm", "so updates are off-policy")):
        assert words in describe_plan(config_of(preset, AHEAD)) and words not in describe_plan(config_of(preset, {}))


def test_a_request_says_which_chains_it_is() -> None:
    request = ChainRequest(3, [], torch.zeros(1))
    assert request.name(range(4, 8)) == "chains 4 to 7 of update 3" and not request.partial
    assert replace(request, theta=torch.ones(1)).theta == 1
