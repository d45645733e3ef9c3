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

from tests.rewards import tiny

ROOT = Path(__file__).parents[2]
PROMPTS = ["A red cat", "a dog", "two boats sail"]  # the last word is unknown
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def compare(reward: Any, golden: dict[str, Any]) -> None:
    images = IMAGES.double().requires_grad_()
    scores = reward(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores, torch.tensor(golden["scores"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    norms = torch.tensor(golden["gradient"]["norms"], dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(1).norm(dim=1), norms, rtol=1e-9, atol=0)
    first = torch.tensor(golden["gradient"]["first"], dtype=torch.float64)
    torch.testing.assert_close(gradient[:, :, 0, 0], first, rtol=1e-8, atol=1e-12)


def test_scores_and_gradients_are_the_packages(tmp_path: Path) -> None:
    compare(tiny.load("imagereward", tiny.save_imagereward(tmp_path)), tiny.GOLDEN)


@pytest.mark.skipif(
    importlib.util.find_spec("ImageReward") is None,
    reason="compares with the image-reward package: pip install --no-deps image-reward==1.5",
)
def test_another_model_scores_as_in_the_installed_package(tmp_path: Path) -> None:
    """In a process of its own, whose modules it changes: the package itself does not import with today's libraries."""
    seed, place = 3, tmp_path / "golden.json"
    command = [sys.executable, str(ROOT / "scripts" / "imagereward_golden.py"), str(place), str(seed)]
    subprocess.run(command, check=True)
    golden = json.loads(place.read_text())
    assert golden["scores"] != tiny.GOLDEN["scores"]
    compare(tiny.load("imagereward", tiny.save_imagereward(tmp_path, golden, seed)), golden)
