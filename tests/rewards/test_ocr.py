"""The OCR reward: what a real reader reads, and distances computed another way."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score
from rlr_ray.rewards.ocr import edit_distance

pytest.importorskip("rapidocr", reason="pip install 'rlr-ray[ocr]'")
CPU = torch.device("cpu")


def written(*texts: str) -> Tensor:  # [n, 3, 64, 192]
    """Black on white, by Pillow."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 34)
    images = []
    for text in texts:
        image = Image.new("RGB", (192, 64), "white")
        ImageDraw.Draw(image).text((10, 10), text, fill="black", font=font)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(images)


def test_a_picture_is_read_and_held_against_what_its_prompt_or_its_metadata_wants() -> None:
    reward = load_reward("ocr", {"side": 128}, CPU)
    prompts = [
        'a sign that reads "OPEN 24"',
        "a sign that reads 'Opel 24'",
        "a sign",
        'a "?" and nothing',
        "\u2018open\u2019 “24”",
    ]
    metadata: list[dict[str, Any]] = [{}, {}, {"text": "open"}, {}, {"text": ""}]
    images = torch.cat([written("OPEN 24", "OPEN 24", "OPEN 24", ""), written("OPEN 24")])
    scores = score(reward, images, prompts, metadata, "ocr")
    torch.testing.assert_close(scores, torch.tensor([1.0, 1 - 1 / 6, 1 - 2 / 4, 0.0, 1.0]))
    with pytest.raises(UserError, match=r"\"a dog's bone isn't\" quotes no text and has no metadata 'text'"):
        score(reward, images[:1], ["a dog's bone isn't"], [{}], "ocr")


def test_letters_of_two_widths_are_alike_and_case_counts_if_it_is_to() -> None:
    def engine(picture: Any) -> Any:
        return SimpleNamespace(txts=("欢迎", "\uff21b"))  # a wide A

    for case, expected in ((False, 1.0), (True, 1 - 1 / 4)):
        reward: Any = load_reward("ocr", {"side": 64, "case": case}, CPU)
        reward.engine = engine
        assert reward(torch.zeros(1, 3, 8, 8), ["写着「欢迎ab」的牌子"], [{}]).tolist() == pytest.approx([expected])


def test_the_edit_distance_is_that_of_its_definition() -> None:
    @functools.cache
    def distance(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        same = distance(one[1:], other[1:]) + (one[0] != other[0])
        return min(same, distance(one[1:], other) + 1, distance(one, other[1:]) + 1)

    draw = random.Random(0)
    for _ in range(50):
        one, other = ("".join(draw.choices("ab猫", k=draw.randrange(7))) for _ in range(2))
        assert edit_distance(one, other) == distance(one, other)
