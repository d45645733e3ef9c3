"""Rewards in actors of their own: the same scores, gradients and weights as in process, also when an actor dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from rlr_ray.cluster.batching import Answer, Asked, Batches
from rlr_ray.cluster.launch import on_worker
from rlr_ray.cluster.resources import bundles_of, hold_resources
from rlr_ray.cluster.reward_actors import RemoteReward, RewardActor, remote_rewards
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.rewards import RewardActorsConfig, RewardConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from rlr_ray.rewards.mixture import Mixture
from rlr_ray.train.engine import Engine
from tests.cluster.test_runs import summary_here, summary_on_ray
from tests.leftovers import living, nothing_left
from tests.runs import logged, short_run

CPU = torch.device("cpu")
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ASKED = (["a handwritten three", "a handwritten eight"] * 3, [{}] * 6)
DIGITS = load_reward("digits", {}, CPU)
OWN = """
import os, time

def own(images, prompts, metadata):
    with open(f"sizes-{os.getpid()}", "a") as file:
        print(len(images), file=file)
    if "raise" in prompts:
        raise ValueError("an odd pixel")
    time.sleep(1000 if "hang" in prompts else 0.3 if "slow" in prompts else 0)
    return images.mean((1, 2, 3)) * float(os.environ["OWN_FACTOR"]) * len(os.environ["OWN_TOKEN"])

own.differentiable = True
"""
uses_ray = pytest.mark.ray


class Near(RemoteReward):
    """Asks an actor that is an object of this process."""

    def __init__(self, name: str, differentiable: bool = True):
        super().__init__(name, [], 1.0, differentiable)
        self.actor = RewardActor(name, RewardConfig(name=name, actors=RewardActorsConfig()), None, 1, {})
        self.asked: list[str] = []

    def _ask(self, method: str, *asked: Any) -> Any:
        self.asked.append(method)
        return asyncio.run(getattr(self.actor, method)(*asked))


def gradient_of(reward: Any, weights: Tensor, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    scores = reward(images, *ASKED)
    return scores.detach(), torch.autograd.grad(scores @ weights, images)[0]


def test_scores_and_gradients_are_the_rewards_own() -> None:
    near = Near("digits")
    for factor in (torch.ones(6), torch.full((6,), 0.25)):  # powers of two: not even the last bit differs
        for found, expected in zip(gradient_of(near, factor), gradient_of(DIGITS, factor), strict=True):
            assert torch.equal(found, expected)
    uneven = torch.arange(1.0, 7.0) / 3
    torch.testing.assert_close(gradient_of(near, uneven)[1], gradient_of(DIGITS, uneven)[1])
    assert torch.equal(near(IMAGES[:4:2], *(given[:4:2] for given in ASKED)), near(IMAGES, *ASKED)[:4:2])


def test_gradients_are_asked_for_only_where_they_are_needed() -> None:
    near, black_box = Near("digits"), Near("digits", differentiable=False)
    near(IMAGES, *ASKED)
    with torch.no_grad():
        near(IMAGES.clone().requires_grad_(), *ASKED)
    assert not black_box(IMAGES.clone().requires_grad_(), *ASKED).requires_grad
    assert near.asked == ["score"] * 2 and black_box.asked == ["score"]


def test_several_in_one_mixture_add_their_gradients() -> None:
    """Also with hooks on the images, and through what the images came from."""
    configs = {
        "digits": RewardConfig(name="digits", invalid=-9.0),
        "half": RewardConfig(name="digits", weight=0.5),
    }
    near = {label: Near("digits") for label in configs}
    gradients = []
    for built in (near, {}):
        latent = IMAGES.clone().requires_grad_()
        mixture = Mixture(configs, CPU, built)
        scores, total = mixture.score((latent * 2).sigmoid(), *ASKED).scores, mixture.weighted_sum()
        (first,) = torch.autograd.grad(total.parts(scores).sum(), latent, retain_graph=True)
        (again,) = torch.autograd.grad(total.parts(scores).sum(), latent)
        assert torch.equal(first, again)
        gradients.append(first)
    torch.testing.assert_close(*gradients)


def test_a_reward_without_a_gradient_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut_reward.py").write_text("def cut(images, prompts, metadata): return images.detach().mean((1, 2, 3))\n")
    with pytest.raises(UserError, match=r"carries no gradient.*differentiable: false"):
        Near("cut_reward:cut")(IMAGES.clone().requires_grad_(), *ASKED)


def calls(batches: Batches, sizes: list[int], gradients: list[bool]) -> list[Answer]:
    """What each caller gets; its images are all of its number."""

    async def together() -> list[Answer]:
        asked = [
            Asked(torch.full((size, 3, 1, 1), float(number)), [""] * size, [{}] * size, gradient)
            for number, (size, gradient) in enumerate(zip(sizes, gradients, strict=True))
        ]
        return list(await asyncio.gather(*map(batches, asked)))

    return asyncio.run(together())


@pytest.mark.parametrize(
    ("size", "gradients", "expected"),
    [
        (None, [False] * 4, [2, 1, 3, 4]),
        (6, [False] * 4, [6, 4]),
        (100, [False] * 4, [10]),
        (5, [False] * 4, [3, 3, 4]),
        (100, [True, False, True, False], [5, 5]),
        (1, [False] * 4, [2, 1, 3, 4]),  # a call is never split
    ],
)
def test_calls_that_come_together_are_one_and_each_gets_its_own_rows(
    size: int | None, gradients: list[bool], expected: list[int]
) -> None:
    computed: list[int] = []

    def compute(asked: Asked) -> Answer:
        computed.append(len(asked.images))
        return asked.images[:, 0, 0, 0] * 10, asked.images * 2 if asked.gradient else None

    sizes = [2, 1, 3, 4]
    answers = calls(Batches(compute, size, 0.05, 1), sizes, gradients)
    assert computed == expected
    for number, (scores, gradient) in enumerate(answers):
        assert scores.tolist() == [number * 10.0] * sizes[number]
        assert (gradient is not None) == gradients[number]
        assert gradient is None or (len(gradient) == sizes[number] and bool((gradient == 2 * number).all()))


def test_an_error_reaches_all_whose_calls_were_computed_together() -> None:
    def compute(asked: Asked) -> Answer:
        raise UserError("too dark")

    async def both(batches: Batches) -> list[Any]:
        asked = Asked(IMAGES, *ASKED, False)
        return await asyncio.gather(batches(asked), batches(asked), return_exceptions=True)

    assert [str(error) for error in asyncio.run(both(Batches(compute, 100, 0.05, 1)))] == ["too dark"] * 2


def test_actors_without_a_cluster_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewards\.digits\.actors .*cluster is 'none'.*leave actors out"):
        short_run(tmp_path, reward={"actors": {}})
    with pytest.raises(UserError, match=r"evaluation\.judges\.digits_judge\.actors"):
        short_run(tmp_path, evaluation={"judge": {"actors": {}}})


def test_its_module_is_needed_in_its_actors_alone(tmp_path: Path) -> None:
    reward = {"name": "nowhere_but_there:reward", "differentiable": True, "video": False, "actors": {}}
    engine = Engine(short_run(tmp_path, cluster={}, reward=reward), {"nowhere_but_there:reward": Near("digits")})
    assert torch.equal(engine.rewards.score(IMAGES, *ASKED).scores[0], DIGITS(IMAGES, *ASKED))


def test_they_count_in_what_a_run_takes(tmp_path: Path) -> None:
    actors = {"cpus": 0.5, "gpus": 0.25, "replicas": 2}
    config = short_run(tmp_path, cluster={}, reward={"actors": actors}, evaluation={"judge": {"actors": {"cpus": 0}}})
    assert bundles_of(ClusterConfig(), 1, config.remote_rewards) == [
        [{"CPU": 1}],
        [{"CPU": 0.5}],
        [{"CPU": 0.5, "GPU": 0.25}] * 2,
        [],
    ]


# --- with Ray


@contextmanager
def apart(folder: Path, **reward: Any) -> Iterator[dict[str, RemoteReward]]:
    config = short_run(folder, cluster={"worker": {"cpus": 0.5}}, reward=reward)
    assert config.cluster != "none"
    with (
        nothing_left(),
        hold_resources(config.cluster, 0, local=True, remote=config.remote_rewards) as place,
        remote_rewards(config, place) as built,
    ):
        yield built


@pytest.fixture(scope="module")
def own(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteReward]:
    """A reward of the user's own, in one actor with an environment of its own. Tests work in its folder."""
    folder, before = tmp_path_factory.mktemp("own"), os.getcwd()
    (folder / "own_reward_apart.py").write_text(OWN)
    os.chdir(folder)
    os.environ["OWN_SECRET"] = "ab"
    variables = {"OWN_FACTOR": "2", "OWN_TOKEN": "${OWN_SECRET}"}
    actors = {"cpus": 0.5, "batch_size": 8, "runtime_env": {"env_vars": variables}, "timeout_s": 120}
    try:
        with apart(folder, name="own_reward_apart:own", actors=actors) as built:
            yield next(iter(built.values()))
    finally:
        os.chdir(before)
        del os.environ["OWN_SECRET"]


def sizes() -> list[int]:
    return [int(line) for file in Path().glob("sizes-*") for line in file.read_text().split()]


@uses_ray
def test_many_callers_share_batches_and_get_their_own_rows(own: RemoteReward) -> None:
    """And the reward reads its own environment."""
    own(IMAGES[:2], ["slow"] * 2, [{}] * 2)
    before = len(sizes())
    with ThreadPoolExecutor(8) as pool:
        shares = [torch.full((2, 3, 2, 2), number / 8) for number in range(8)]
        found = list(pool.map(lambda share: own(share, ["slow"] * 2, [{}] * 2), shares))
    assert [scores.tolist() for scores in found] == [[number / 2] * 2 for number in range(8)]
    counted = sizes()[before:]
    assert sum(counted) == 16 and len(counted) < 8 and max(counted) <= 8
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(own(images, *ASKED).sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 4 / images[0].numel()))


@uses_ray
def test_an_error_of_the_reward_is_told_in_its_words(own: RemoteReward) -> None:
    with pytest.raises(UserError, match=r"^reward '.*own' raised ValueError: an odd pixel .*own_reward_apart\.py"):
        own(IMAGES, ["raise"] * 6, [{}] * 6)


@uses_ray
def test_one_that_does_not_answer_is_given_up_and_one_that_died_is_asked_again(own: RemoteReward) -> None:
    impatient = RemoteReward(own.label, own.actors, 1.0, True)
    with pytest.raises(UserError, match=r"gave no scores within 1 s: it does not answer; .*timeout_s"):
        impatient(IMAGES, ["hang"] * 6, [{}] * 6)
    ray.kill(own.actors[0], no_restart=False)
    torch.testing.assert_close(own(IMAGES, *ASKED), IMAGES.mean((1, 2, 3)) * 4)


@uses_ray
@pytest.mark.usefixtures("cluster")
def test_another_replica_answers_for_one_that_is_gone(tmp_path: Path) -> None:
    with apart(tmp_path, actors={"cpus": 0.25, "replicas": 2}) as built:
        reward = built["digits"]
        assert torch.equal(reward(IMAGES, *ASKED), DIGITS(IMAGES, *ASKED))
        ray.kill(reward.actors[0])
        for _ in range(2):
            assert torch.equal(reward(IMAGES, *ASKED), DIGITS(IMAGES, *ASKED))
        ray.kill(reward.actors[1])
        with pytest.raises(UserError, match=r"within 2 s: its actor was lost .*is not back"):
            RemoteReward("digits", reward.actors, 2.0, True)(IMAGES, *ASKED)


@uses_ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"options": {"size": 3}, "actors": {}}, r"'digits' does not take reward\.options"),
        ({"actors": {"runtime_env": {"working_dir": 3}}}, r"refuses the runtime_env .*'working_dir': 3"),
        ({"actors": {"cpus": 64}}, r"1 actors of reward digits of 64 CPU\).*no node has 64 CPU"),
    ],
    ids=["options", "runtime_env", "room"],
)
def test_one_that_cannot_start_ends_the_run_before_it_begins(tmp_path: Path, reward: Any, words: str) -> None:
    with pytest.raises(UserError, match=words), apart(tmp_path, **reward):
        pass


def scored(config: RunConfig, built: dict[str, RemoteReward], images: Tensor) -> tuple[int, Tensor]:
    return len(built), Engine(config, built).rewards.score(images, *ASKED).scores


@uses_ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_what_measures_in_a_workers_place_asks_them_too(tmp_path: Path) -> None:
    """The planner, and the estimates of a search."""
    config = short_run(tmp_path, cluster={"worker": {"cpus": 0.5}}, reward={"actors": {"cpus": 0.25}})
    assert config.cluster != "none"
    with nothing_left():
        count, scores = on_worker(config, config.cluster, scored, IMAGES, local=True)
    assert count == 1 and torch.equal(scores[0], DIGITS(IMAGES, *ASKED))


@pytest.mark.slow
@uses_ray
@pytest.mark.usefixtures("cluster")
def test_a_run_ends_with_the_local_weights_though_a_rewards_actor_dies(tmp_path: Path) -> None:
    """Its chunks are of four, so that what a score counts for is a power of two: no bit of the gradients differs."""
    actors = {"cpus": 0.25}
    cluster = {"worker": {"cpus": 0.5}, "rollouts": {"cpus": 0.25}}
    config = short_run(tmp_path, cluster=cluster, reward={"actors": actors}, evaluation={"judge": {"actors": actors}})
    others, killed = living("RewardActor"), list[str]()

    def kill_once(row: dict[str, Any]) -> None:
        if not killed:
            assert row["step"] < 3
            name, actor = next((name, one) for name, one in living("RewardActor").items() if name not in others)
            os.kill(actor["Pid"], signal.SIGKILL)
            killed.append(name)

    with nothing_left(), logged() as said:
        summary = summary_on_ray(config, kill_once)
    local = summary_here(short_run(tmp_path, name="local"))
    assert int(ray._private.state.actors()[killed[0]]["NumRestarts"]) == 1
    assert "starting 1 actor of reward digits" in said
    for name in ("theta_sha256", "gain", "scores"):
        assert summary[name] == local[name]
