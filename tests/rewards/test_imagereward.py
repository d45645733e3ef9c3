"""ImageReward against numbers that the `image-reward` package's own classes gave (scripts/imagereward_golden.py)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from scripts.imagereward_golden import filled

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "rewards" / "imagereward.json").read_text())
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "dog", "two", "boats", "snow", "[MASK]"]
PROMPTS = ["A red cat", "a dog", "two boats sail"]  # the last word is unknown
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def save(golden: dict[str, Any], seed: int, folder: Path) -> Path:
    """A tiny model in the official files' form."""
    torch.save(filled(golden["shapes"], seed), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(golden["text"]))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


def load(folder: Path) -> Any:
    return load_reward("imagereward", {"path": str(folder), "tokenizer": str(folder)}, CPU).double()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(GOLDEN, 0, tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> Any:
    return load(folder)


def compare(reward: Any, golden: dict[str, Any]) -> None:
    images = IMAGES.double().requires_grad_()
    scores = reward(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores, torch.tensor(golden["scores"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    norms = torch.tensor(golden["gradient"]["norms"], dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), norms, rtol=1e-9, atol=0)
    first = torch.tensor(golden["gradient"]["first"], dtype=torch.float64)
    torch.testing.assert_close(gradient[:, :, 0, 0], first, rtol=1e-8, atol=1e-12)


def test_scores_and_gradients_are_the_packages(reward: Any) -> None:
    compare(reward, GOLDEN)


@pytest.mark.skipif(
    importlib.util.find_spec("ImageReward") is None,
    reason="compares with the image-reward package: pip install --no-deps image-reward==1.5",
)
def test_another_model_scores_as_in_the_installed_package(tmp_path: Path) -> None:
    """In a process of its own, whose modules it changes; the package itself does not import with today's transformers."""
    seed, place = 3, tmp_path / "golden.json"
    command = [sys.executable, str(ROOT / "scripts" / "imagereward_golden.py"), str(place), str(seed)]
    subprocess.run(command, check=True)
    golden = json.loads(place.read_text())
    assert golden["scores"] != GOLDEN["scores"]
    compare(load(save(golden, seed, tmp_path)), golden)


def test_each_image_is_scored_for_its_own_prompt(reward: Any) -> None:
    whole = reward(IMAGES.double(), PROMPTS, [{}] * 3)
    alone = [reward(image[None].double(), [prompt], [{}]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    torch.testing.assert_close(whole, torch.cat(alone))
    assert not torch.isclose(whole, reward(IMAGES.double(), PROMPTS[::-1], [{}] * 3))[[0, 2]].any()


def test_gradients_agree_with_finite_differences(reward: Any) -> None:
    def scores(images: Tensor) -> Tensor:
        return reward(images, PROMPTS[:1], [{}])

    images = torch.rand(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2
    assert torch.autograd.gradcheck(scores, images.requires_grad_(), fast_mode=True)


def test_missing_files_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no ImageReward\.pt and no med_config\.json; see docs/rewards\.md"):
        load_reward("imagereward", {"path": str(tmp_path)}, CPU)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'nobody/nothing' is no folder here.*hf download nobody/nothing"):
        load_reward("imagereward", {"path": "nobody/nothing"}, CPU)
