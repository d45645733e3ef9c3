"""Every reward against every defect that public versions of rewards have or had.

Every image scored against the first prompt; a mean over the batch for each of its images; images scaled or normalised
twice; gradients cut by no_grad or by rounding to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from rlr_ray.rewards import REWARDS, is_differentiable, is_video, score
from rlr_ray.rewards.digits import WORDS
from rlr_ray.rewards.images import pictures
from tests.rewards import tiny
from tests.rewards.servers import brightness, pixels, server

PROMPTS = ["a handwritten two", "seven", "a handwritten three"]
CAPTIONS = ["A red cat", "a dog", "two boats"]  # in imagereward's own vocabulary
NUMBERS = ["1", "2", "3"]
MOVING = ["a two moving left", "seven moving up", "a three moving right"]
DIGITS = ("digits", "digits_judge", "moving_digits", "moving_digits_judge")
DIFFERENTIABLE = [name for name in REWARDS if is_differentiable(name)]
READERS = ("geneval", "ocr", "sfw", "vlm", "vqa")  # of what noise does not have: they have tests of their own
MOTION = ("dynamic_degree", "motion_smoothness")
BLIND = ("aesthetic", "jpeg_compressibility", "jpeg_incompressibility", *MOTION)  # to the prompt


@dataclass
class Case:
    name: str
    reward: Any
    prompts: list[str]
    received: list[dict[str, Any]]  # what a server was asked

    def images(self, seed: int = 1) -> Tensor:
        """Or videos, of the reward's own size, of 8 bits, so that no reader need round them."""
        size = 16 if self.name in DIGITS else tiny.SIZE
        frames = [8] if is_video(self.name) else []
        noise = torch.randint(0, 256, (3, *frames, 3, size, size), generator=torch.Generator().manual_seed(seed))
        return noise.to(torch.float64) / 255

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return score(self.reward, images, prompts, [{}] * len(prompts), self.name)


@pytest.fixture(scope="module", params=[name for name in REWARDS if name not in READERS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name, received = request.param, []
    if name == "http":
        with server(lambda asked: received.append(asked) or brightness(asked)) as (url, _):
            yield Case(name, tiny.load(name, {"url": url, "batch_size": 2}), NUMBERS, received)
        return
    options = tiny.SAVED[name](tmp_path_factory.mktemp(name)) if name in tiny.SAVED else {}
    prompts = CAPTIONS if name == "imagereward" else MOVING if name.startswith("moving") else PROMPTS
    found = Case(name, tiny.load(name, options), prompts, received)
    if name == "digits_judge":  # which answers 1 or 0: the first prompt's digit is there, the others' are not
        read = found.reward.classifier(found.images()).argmax(-1).tolist()
        found.prompts = [WORDS[read[0]], *("zero" if digit else "one" for digit in read[1:])]
    if name == "moving_digits_judge":
        found.reward.classifier = Reads()
    yield found


class Reads(nn.Module):
    """In place of a classifier, to which noise stands still: reads a two that goes left in every video."""

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        two, left = torch.tensor([2, 0]).repeat(len(videos), 1).unbind(1)
        return nn.functional.one_hot(two, 10).to(videos), nn.functional.one_hot(left, 5).to(videos)


def test_each_image_is_scored_against_its_own_prompt(case: Case) -> None:
    images = case.images()
    own, first = case(images, case.prompts), case(images, [case.prompts[0]] * 3)
    assert own[0] == pytest.approx(first[0].item())
    if case.name in BLIND:
        assert torch.equal(own, first)
    else:
        assert not torch.isclose(own, first)[1:].any()


def test_a_score_is_that_of_the_image_alone(case: Case) -> None:
    images = case.images()
    whole = case(images, case.prompts)
    alone = [case(images[i : i + 1], case.prompts[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))
    assert len(whole.unique()) > 1
    turned = case(images.flip(0), case.prompts[::-1])
    torch.testing.assert_close(whole, turned.flip(0))


@pytest.mark.parametrize("case", [name for name in REWARDS if name not in (*MOTION, *READERS)], indirect=True)
def test_pixels_reach_the_encoder_scaled_once(case: Case) -> None:
    """A known image, of the encoder's size: as CLIP's own processor gives it, or as it was."""
    images = case.images()
    found = encoder_input(case, images)
    if case.name in tiny.SAVED:
        processor = CLIPImageProcessorPil(size={"shortest_edge": tiny.SIZE}, crop_size=tiny.SIZE)
        expected = processor(pictures(images), return_tensors="pt").pixel_values.double()
    else:
        expected = images
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def encoder_input(case: Case, images: Tensor) -> Tensor:
    """The pixels that the reward's model, or server, or JPEG gets."""
    if case.name == "http":
        case.received.clear()
        case(images, case.prompts)
        batches = sorted(case.received, key=lambda asked: asked["prompts"])
        return torch.stack([torch.from_numpy(p).movedim(2, 0) for asked in batches for p in pixels(asked)])
    if not isinstance(case.reward, nn.Module):  # JPEG
        return torch.stack([torch.from_numpy(numpy.array(picture)).movedim(2, 0) / 255 for picture in pictures(images)])
    encoder = case.reward.classifier if case.name in DIGITS else vision(case.reward)
    seen: list[Tensor] = []
    hook = encoder.register_forward_pre_hook(
        lambda module, given, named: seen.append(given[0] if given else named["pixel_values"]), with_kwargs=True
    )
    case(images, case.prompts)
    hook.remove()
    return seen[0]


def vision(reward: Any) -> nn.Module:
    found: nn.Module = reward.vision if hasattr(reward, "vision") else reward.model.vision_model
    return found


@pytest.mark.parametrize("case", DIFFERENTIABLE, indirect=True)
def test_gradients_reach_the_pixels(case: Case) -> None:
    """They agree with finite differences, through the resizing too, and stay within their own image."""
    height, width = (16, 16) if case.name in DIGITS else (12, 16)
    frames = [8] if is_video(case.name) else []
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, *frames, 3, height, width, dtype=torch.float64, generator=generator) * 0.6 + 0.2
    images.requires_grad_()
    prompts = case.prompts[:2]
    assert torch.autograd.gradcheck(lambda images: case(images, prompts), images, fast_mode=True)
    (gradient,) = torch.autograd.grad(case(images, prompts)[1], images)
    assert gradient[1].norm() > 0 and gradient[0].norm() == 0


def test_a_black_box_says_so(case: Case) -> None:
    """What gives no gradients is not differentiated in silence: the recipe is refused instead."""
    images = case.images().requires_grad_()
    assert case(images, case.prompts).requires_grad == is_differentiable(case.name)
