from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.errors import UserError
from rlr_ray.rewards import REWARDS, find_reward, is_differentiable, is_video, load_reward, score
from rlr_ray.rewards.digits import WORDS, named

CPU = torch.device("cpu")
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a handwritten one", "two", "Three please"]
OWN = """
import torch

def brightness(images, prompts, metadata, power=1.0):
    return images.mean((1, 2, 3)) ** power
brightness.differentiable = True

class Counting:
    differentiable = False
    def __init__(self, start=0):
        self.start = start
    def __call__(self, images, prompts, metadata):
        return [self.start + len(prompt) for prompt in prompts]

class Weightless:
    def __init__(self): open("weights.bin")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards_for_tests.py").write_text(OWN)
    (tmp_path / "reward_with_a_typo.py").write_text("def f(images, prompts, metadata: return 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_every_line_of_the_table_names_a_class_of_its_own() -> None:
    classes = [find_reward(name) for name in REWARDS]
    assert all(isinstance(found, type) for found in classes) and len({*classes}) == len(REWARDS)
    assert list(REWARDS) == sorted(REWARDS)
    assert [name for name in REWARDS if is_video(name)] == [
        "dynamic_degree",
        "motion_smoothness",
        "moving_digits",
        "moving_digits_judge",
    ]


def test_what_the_table_says_is_known_without_the_rewards_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("importlib.import_module")
    assert is_differentiable("pickscore") and not is_video("pickscore")
    assert is_video("moving_digits_judge") and not is_differentiable("moving_digits_judge")


def test_digits_reward_is_the_classifiers_log_probability_of_the_named_digit() -> None:
    reward = load_reward("digits", {}, CPU)
    scores = score(reward, IMAGES, PROMPTS, [{}] * 3, "digits")
    logits = reward.classifier(IMAGES)  # type: ignore[attr-defined]
    expected = torch.tensor([(logits[i].exp() / logits[i].exp().sum())[i + 1].log() for i in range(3)])
    torch.testing.assert_close(scores, expected)


def test_a_prompt_must_name_exactly_one_digit() -> None:
    assert named("digit", WORDS, PROMPTS).tolist() == [1, 2, 3]
    for prompt in ("a cat", "one or two"):
        with pytest.raises(UserError, match="names one digit"):
            named("digit", WORDS, [prompt])


@pytest.mark.usefixtures("own")
def test_own_function_and_class_by_dotted_path() -> None:
    brightness = load_reward("own_rewards_for_tests:brightness", {"power": 2.0}, CPU)
    torch.testing.assert_close(score(brightness, IMAGES, PROMPTS, [{}] * 3, "b"), IMAGES.mean((1, 2, 3)) ** 2)
    counting = load_reward("own_rewards_for_tests:Counting", {"start": 5}, CPU)
    assert score(counting, IMAGES, PROMPTS, [{}] * 3, "c").tolist() == [22.0, 8.0, 17.0]
    assert is_differentiable("own_rewards_for_tests:brightness")
    assert not is_differentiable("own_rewards_for_tests:Counting")
    assert is_differentiable("own_rewards_for_tests:Counting", stated=True)
    assert not is_video("own_rewards_for_tests:brightness")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("fact", ["differentiable", "video"])
def test_a_module_that_cannot_be_imported_says_neither_yes_nor_no(fact: str) -> None:
    """A recipe that uses a broken module is refused, not read as one without gradients or videos."""
    known = {"differentiable": True, "video": False}
    for name, word in (("reward_with_a_typo:f", "SyntaxError"), ("no_such_module:f", "no module 'no_such_module'")):
        unknown = JudgeConfig(name=name, **{**known, fact: None})
        with pytest.raises(UserError, match=f"{word}.*state `{fact}` in the recipe"):
            (is_differentiable if fact == "differentiable" else is_video)(name, getattr(unknown, fact))
        assert is_differentiable(name, True) and not is_video(name, False)


def test_a_defect_of_a_shipped_reward_is_not_told_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: object, path: Path) -> None:
        raise AttributeError("a defect")

    monkeypatch.setattr("rlr_ray.rewards.digits.load_classifier", broken)
    with pytest.raises(AttributeError, match="a defect"):
        load_reward("digits", {}, CPU)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("digit", {}, ["'digit'", "digits, digits_judge", "module:function"]),
        ("no_such_module:f", {}, ["no_such_module", "working folder"]),
        ("own_rewards_for_tests:nothing", {}, ["nothing", "after the colon"]),
        ("own_rewards_for_tests:brightness", {"powr": 2}, ["powr", "reward.options"]),
        ("own_rewards_for_tests:Counting", {"begin": 2}, ["begin", "reward.options"]),
        ("own_rewards_for_tests:Weightless", {}, ["could not be built", "FileNotFoundError", "in __init__"]),
        ("reward_with_a_typo:f", {}, ["reward_with_a_typo", "SyntaxError", "line 1"]),
    ],
)
def test_a_reward_that_cannot_be_built_is_refused(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_reward(name, options, CPU)
    assert all(word in str(error.value) for word in words)


def _mean_of_batch(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return images.mean()


def _extra_dimension(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return images.mean((2, 3))


def _not_a_number(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return torch.tensor([0.0, float("nan"), 1.0])


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (_mean_of_batch, ["shape []", "[3]", "one score an image"]),
        (_extra_dimension, ["shape [3, 3]", "[3]"]),
        (_not_a_number, ["nan", "image 1", "'two'", "finite"]),
    ],
)
def test_a_score_of_the_wrong_kind_is_refused(reward: Callable[..., Tensor], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        score(reward, IMAGES, PROMPTS, [{}] * 3, "mine")
    assert all(word in str(error.value) for word in [*words, "'mine'"])
