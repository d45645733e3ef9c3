"""Several rewards in one: what each counts for, which have gradients, and scores that are not finite."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rlr_ray.config.recipe import parse_config, with_facts
from rlr_ray.config.rewards import RewardActorsConfig, RewardConfig
from rlr_ray.errors import UserError
from rlr_ray.rewards.mixture import Mixture, Scored
from tests.runs import RECIPE

CPU = torch.device("cpu")
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ASKED = (["a handwritten three"] * 6, [{}] * 6)


def bright(images: Tensor, prompts: object, metadata: object) -> Tensor:
    return images.mean((1, 2, 3))


def red(images: Tensor, prompts: object, metadata: object) -> Tensor:
    return images[:, 0].mean((1, 2))


def root(images: Tensor, prompts: object, metadata: object) -> Tensor:
    """Not a number for image 2, and neither is its gradient."""
    shifted = images.mean((1, 2, 3)) - 2 * (torch.arange(len(images)) == 2)
    return shifted.sqrt()


bright.differentiable = root.differentiable = True  # type: ignore[attr-defined]
own = ModuleType("mixed_rewards_for_tests")
own.bright, own.red, own.root = bright, red, root  # type: ignore[attr-defined]
sys.modules[own.__name__] = own


def mixture(**rewards: object) -> Mixture:
    configs = {
        label: with_facts(RewardConfig(name=f"mixed_rewards_for_tests:{label}", **options))
        for label, options in rewards.items()
    }
    return Mixture(configs, CPU, {})


def test_parts_are_weighted_and_standardised_by_the_base_models_scores() -> None:
    several = mixture(bright={"weight": 2.0}, red={"weight": -0.5})
    scores = several.score(IMAGES, *ASKED).scores
    torch.testing.assert_close(scores, torch.stack([IMAGES.mean((1, 2, 3)), IMAGES[:, 0].mean((1, 2))]))
    before = torch.tensor([[0.1, 0.3, 0.2, 0.9], [5.0, 7.0, 6.0, 6.0]])
    total = several.weighted_sum(before)
    expected = [
        weight * (row - base.mean()) / base.std() for weight, row, base in zip((2.0, -0.5), scores, before, strict=True)
    ]
    torch.testing.assert_close(total.parts(scores), torch.stack(expected))
    torch.testing.assert_close(total.scores(total.parts(scores)), scores)
    assert several.black_box == (1,)


def test_one_reward_stays_as_it_is_unless_asked() -> None:
    before, rewards = torch.tensor([[1.0, 3.0]]), mixture(bright={})
    one, asked = rewards.weighted_sum(before), mixture(bright={"normalize": True}).weighted_sum(before)
    assert one.standards == ((0.0, 1.0),) and asked.standards == ((2.0, pytest.approx(math.sqrt(2))),)
    assert not one.standardised and asked.standardised
    scores = rewards.score(IMAGES, *ASKED).scores
    assert torch.equal(one.parts(scores), scores) and one == rewards.weighted_sum()


def test_gradients_pass_through_the_differentiable_rewards_alone() -> None:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture(bright={}, red={}).score(images, *ASKED).scores.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 1 / 48))


def test_what_was_replaced_is_no_part_of_the_standards() -> None:
    before = torch.tensor([[1.0, math.nan, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    total = mixture(bright={"invalid": -1e6}, red={}).weighted_sum(before)
    assert total.standards == ((2.0, 1.0), (2.5, pytest.approx(math.sqrt(5 / 3))))


def test_a_score_that_equals_what_replaces_others_is_a_score() -> None:
    """Of a reward that is 0 or 1, with `invalid: 0`, zeros would all have been left out."""
    marks = torch.tensor([False, False, False, True])
    rows = Scored(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]), marks.expand(2, -1), 0.0).measured
    total = mixture(bright={"invalid": 0.0}, red={}).weighted_sum(rows)
    assert total.standards == ((pytest.approx(1 / 3), pytest.approx(math.sqrt(1 / 3))), (2.0, 1.0))


def test_a_reward_that_is_cut_from_its_gradient_is_refused_beside_one_that_is_not() -> None:
    rewards = mixture(bright={}, red={"differentiable": True})
    rewards.rewards["red"] = lambda images, *asked: images.detach().mean((1, 2, 3))
    with pytest.raises(UserError, match=r"'red' says that it is differentiable, but carries no gradient"):
        rewards.score(IMAGES.clone().requires_grad_(), *ASKED)
    assert len(rewards.score(IMAGES, *ASKED).scores) == 2  # nobody asked for one


def test_a_score_that_is_not_finite_stops_the_run_or_is_replaced_and_counted() -> None:
    with pytest.raises(UserError, match=r"'root' returned nan for image 2 .*`invalid`"):
        mixture(root={}).score(IMAGES, *ASKED)
    replaced = mixture(root={"invalid": -3.0})
    images = IMAGES.clone().requires_grad_()
    scored = replaced.score(images, *ASKED)
    scores, finite = scored.scores[0], torch.arange(6) != 2
    assert scores[2] == -3 and scored.invalid == 1 and replaced.score(images, *ASKED).invalid == 1  # nothing adds up
    torch.testing.assert_close(scores[finite], IMAGES.mean((1, 2, 3))[finite].sqrt())
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert not gradient[2].any() and bool(gradient[finite].isfinite().all()) and bool(gradient[finite].any())


def test_a_reward_of_actors_that_this_process_cannot_build_is_told_as_such() -> None:
    config = RewardConfig(
        name="nowhere_but_there:reward", differentiable=True, video=False, actors=RewardActorsConfig()
    )
    with pytest.raises(UserError, match=r"'ocr' has actors .*no module 'nowhere_but_there'.*runtime_env"):
        Mixture({"ocr": config}, CPU, {})
    assert Mixture({"ocr": config}, CPU, {"ocr": bright}).labels == ["ocr"]


def test_short_forms_of_a_recipe() -> None:
    plain = {key: value for key, value in RECIPE.items() if key != "reward"}
    config = parse_config(plain | {"rewards": {"digits": 2, "own": {"name": "digits_judge", "invalid": -1}}})
    assert {label: (reward.name, reward.weight) for label, reward in config.rewards.items()} == {
        "digits": ("digits", 2.0),
        "own": ("digits_judge", 1.0),
    }
    assert config.mixed and not config.differentiable
    assert parse_config(config.model_dump(mode="json")) == config
    assert parse_config(RECIPE | {"reward": "digits"}) == parse_config(RECIPE)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rewards": {"digits": 1}}, "both 'reward' and 'rewards'"),
        ({"reward": {"name": "digits", "weight": 0}}, "evaluation.judges"),
        ({"reward": {"name": "digits_judge"}, "estimator": {"first_order": {"steps": 0}}}, "both a reward and a judge"),
        ({"reward": {"name": "digits", "wight": 1}}, r"rewards\.digits\.wight: no such key; allowed here: .*weight"),
        ({"reward": {"name": "digits"}, "evaluation": {"judges": {"digits_judge": -1}}}, "weight: no such key"),
        ({"reward": None, "rewards": {"reward": {"name": "digits"}}}, "label 'reward' is the name of another column"),
        ({"reward": None, "rewards": {"a": {"name": "digits"}, "a_se": {"name": "digits"}}}, "label 'a_se'"),
        (
            {"cluster": {}, "reward": {"name": "digits", "actors": {"timeout_s": 600}}},
            r"rewards\.digits\.actors\.timeout_s is 600, but .*cluster\.rollouts\.timeout_s, 600; allowed: below",
        ),
        ({"reward": {"nam": "digits"}}, "reward: found .*give its name"),
        (
            {"reward": None, "rewards": {"name": "aesthetic", "options": {"path": "x"}}},
            r"name, options.*`reward: \{name",
        ),
        ({"evaluation": {"judges": {"name": "digits_judge"}}}, r"^evaluation: judges: found .* name,.*`judge: \{name"),
        ({"reward": None, "rewards": {"HPSv2": {"wieght": 1}}}, r"^rewards\.HPSv2\.wieght: no such key; .*normalize"),
        ({"reward": None, "rewards": {"int": {"weight": "x"}}}, r"^rewards\.int\.weight: found 'x'"),
        ({"reward": None, "rewards": {"a.b:c": {"actors": {"gpu": 1}}}}, r"^rewards\.a\.b:c\.actors\.gpu: .*replicas"),
    ],
)
def test_recipes_that_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config(RECIPE | keys)
