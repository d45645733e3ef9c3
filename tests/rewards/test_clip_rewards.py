"""PickScore, CLIPScore and the aesthetic score against transformers' own model and image processor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from rlr_ray.rewards.pixels import prepared

CPU = torch.device("cpu")
PROMPTS = ["a handwritten two", "seven", "nine and a handwritten three"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, saved as the real ones are."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(DIGITS / "pipeline" / "tokenizer")
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    shutil.copytree(DIGITS / "pipeline" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def reward(name: str, folder: Path, **options: Any) -> Any:
    built: Any = load_reward(name, {"path": str(folder)} | options, CPU)
    return built.double()


def own_logits(folder: Path) -> Tensor:  # [images, prompts]
    """By the model's own forward pass, images already of its size."""
    model = CLIPModel.from_pretrained(folder).double()
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = prepared(IMAGES.double(), 32)
    logits: Tensor = model(**tokens, pixel_values=pixels).logits_per_image
    return logits.detach()


def test_pickscore_is_the_logit_of_each_image_with_its_own_prompt(folder: Path) -> None:
    """Not, as a public version has it, of every image with the first prompt."""
    logits = own_logits(folder)
    torch.testing.assert_close(reward("pickscore", folder)(IMAGES.double(), PROMPTS, [{}] * 3), logits.diag())
    assert not torch.allclose(logits.diag()[1:], logits[1:, 0])


def test_clipscore_is_two_and_a_half_cosines(folder: Path) -> None:
    built = reward("clipscore", folder)
    expected = 2.5 * own_logits(folder).diag() / built.model.logit_scale.exp()
    torch.testing.assert_close(built(IMAGES.double(), PROMPTS, [{}] * 3), expected)


def test_the_aesthetic_head_sees_features_of_length_one(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(24, 8), nn.Dropout(), nn.Linear(8, 4), nn.Dropout(), nn.Linear(4, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    built = reward("aesthetic", folder, head=str(tmp_path / "head.pth"))
    model = CLIPModel.from_pretrained(folder).double()
    features = model.get_image_features(prepared(IMAGES.double(), 32)).pooler_output
    expected = head.double()(features / features.norm(dim=-1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(built(IMAGES.double(), PROMPTS, [{}] * 3), expected)


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_gradients_agree_with_finite_differences_also_through_the_resizing(name: str, folder: Path) -> None:
    built = reward(name, folder)
    images = torch.rand(2, 3, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2
    assert torch.autograd.gradcheck(
        lambda images: built(images, PROMPTS[:2], [{}] * 2), images.requires_grad_(), fast_mode=True
    )


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


def test_what_is_no_clip_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward 'pickscore': .* gave no CLIP model of transformers"):
        load_reward("pickscore", {"path": str(tmp_path)}, CPU)
