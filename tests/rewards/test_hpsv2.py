"""HPSv2's scores against open_clip's architecture as written down in open_clip.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import CLIPTokenizer

from rlr_ray.errors import UserError
from rlr_ray.rewards.images import normalised
from tests.rewards import tiny

PROMPTS = ["a handwritten two", "seven", "nine and a handwritten three"]
IMAGES = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("version", tiny.HPSV2_FILES)
def test_scores_are_open_clips_cosines(tmp_path: Path, version: str) -> None:
    reference, tokenizer = tiny.open_clip(), CLIPTokenizer.from_pretrained(tiny.TOKENIZER)
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    seen = functional.normalize(reference.visual(normalised(IMAGES)), dim=-1)
    read = functional.normalize(reference.text(ids, ends), dim=-1)
    found = tiny.load("hpsv2", tiny.save_hpsv2(tmp_path, version))(IMAGES, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, (seen * read).sum(-1).detach())


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(UserError, match=r"found version 3; allowed: 2\.0, 2\.1"):
        tiny.load("hpsv2", {"version": 3})
