"""PickScore, CLIPScore and the aesthetic score against transformers' own model and image processor."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from rlr_ray.rewards.images import prepared
from tests.rewards import tiny

PROMPTS = ["a handwritten two", "seven", "nine and a handwritten three"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny.save_aesthetic(folder)
    return folder


def own_logits(folder: Path) -> Tensor:  # [images, prompts]
    """By the model's own forward pass, images already of its size."""
    model = CLIPModel.from_pretrained(folder).double()
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = prepared(IMAGES, 32)
    logits: Tensor = model(**tokens, pixel_values=pixels).logits_per_image
    return logits.detach()


def test_pickscore_is_the_logit_of_each_image_with_its_own_prompt(folder: Path) -> None:
    scores = tiny.load("pickscore", {"path": str(folder)})(IMAGES, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores, own_logits(folder).diag())


def test_clipscore_is_two_and_a_half_cosines(folder: Path) -> None:
    built = tiny.load("clipscore", {"path": str(folder)})
    expected = 2.5 * own_logits(folder).diag() / built.model.logit_scale.exp()
    torch.testing.assert_close(built(IMAGES, PROMPTS, [{}] * 3), expected)


def test_the_aesthetic_head_sees_features_of_length_one(folder: Path) -> None:
    built = tiny.load("aesthetic", {"path": str(folder), "head": str(folder / "head.pth")})
    model = CLIPModel.from_pretrained(folder).double()
    features = model.get_image_features(prepared(IMAGES, 32)).pooler_output
    expected = tiny.aesthetic_head().double()(features / features.norm(dim=-1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(built(IMAGES, PROMPTS, [{}] * 3), expected)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 420), (64, 48), (224, 224)])
def test_pixels_are_those_of_clips_processor(height: int, width: int) -> None:
    """To the processor's rounding to 8 bits: half a step of 1/255 each in the image and in the resized one."""
    generator = numpy.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=numpy.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    expected = CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
    images = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None] / 255
    found = prepared(images.double(), 224)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1.5 / 255 / 0.26
    assert (found - expected).abs().mean() < 0.3 / 255 / 0.26
