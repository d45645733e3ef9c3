"""JPEG's sizes against the files that Pillow writes."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from rlr_ray.rewards import load_reward

CPU = torch.device("cpu")


def test_scores_are_the_kilobytes_that_pillow_writes() -> None:
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = torch.stack([torch.zeros(3, 32, 32), noise])
    small, large = (
        load_reward(f"jpeg_{name}", {}, CPU)(images, ["", ""], [{}] * 2)
        for name in ("compressibility", "incompressibility")
    )
    file = io.BytesIO()
    Image.fromarray((noise * 255).round().byte().permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=95)
    assert large[1] == pytest.approx(len(file.getvalue()) / 1000)
    assert large[0] < large[1]
    assert torch.equal(small, -large)
