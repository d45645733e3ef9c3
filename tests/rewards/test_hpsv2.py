"""HPSv2's scores against open_clip's architecture as written down in open_clip.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from rlr_ray.rewards.pixels import normalised
from tests.rewards.open_clip import OpenClip

CPU = torch.device("cpu")
TOKENIZER = DIGITS / "pipeline" / "tokenizer"
PROMPTS = ["a handwritten two", "seven", "nine and a handwritten three"]
IMAGES = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference() -> OpenClip:
    torch.manual_seed(0)
    return OpenClip(len(CLIPTokenizer.from_pretrained(TOKENIZER)), longest=16).double().eval()


def reward(folder: Path, reference: OpenClip, version: str) -> Any:
    file = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}[version]
    torch.save({"state_dict": reference.state_dict()}, folder / file)
    options = {"path": str(folder), "tokenizer": str(TOKENIZER), "version": version}
    built: Any = load_reward("hpsv2", options, CPU)
    return built.double()


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_scores_are_open_clips_cosines(tmp_path: Path, reference: OpenClip, version: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    seen = functional.normalize(reference.visual(normalised(IMAGES)), dim=-1)
    read = functional.normalize(reference.text(ids, ends), dim=-1)
    found = reward(tmp_path, reference, version)(IMAGES, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, (seen * read).sum(-1).detach())


def test_gradients_agree_with_finite_differences(tmp_path: Path, reference: OpenClip) -> None:
    built = reward(tmp_path, reference, "2.1")

    def scores(images: Tensor) -> Tensor:
        found: Tensor = built(images, PROMPTS[:1], [{}])
        return found

    images = torch.rand(1, 3, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2
    assert torch.autograd.gradcheck(scores, images.requires_grad_(), fast_mode=True)


def test_a_version_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no HPS_v2\.1_compressed\.pt"):
        load_reward("hpsv2", {"path": str(tmp_path), "tokenizer": str(TOKENIZER)}, CPU)
