"""GenEval's checks: detections against transformers' own pipeline, colours against CLIP by hand, the rest by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, YolosConfig, YolosForObjectDetection, YolosImageProcessor, pipeline

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward
from rlr_ray.rewards.geneval import COLORS, Geneval, entries_held, relations
from rlr_ray.rewards.images import pictures
from tests.rewards import tiny

LABELS = {0: "cat", 1: "dog", 2: "mouse"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of random weights whose scores lie far apart, and a CLIP."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=12, id2label=LABELS)
    model = YolosForObjectDetection(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and ("layers." in name or "detection_tokens" in name):
            torch.nn.init.normal_(weight, std=0.1 if "classifier.layers.2" in name else 1.0)
    model.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    (folder / "clip").mkdir()
    tiny.save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> Geneval:
    built: Any = load_reward("geneval", {"path": str(folder), "clip": str(folder / "clip")}, torch.device("cpu"))
    return built  # type: ignore[no-any-return]


def noise(count: int, size: int = 40) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_it_sees_what_the_object_detection_pipeline_sees(folder: Path, reward: Geneval) -> None:
    images = noise(3)
    asked = [{}, {"tag": "counting"}, {}]
    detector, counts = pipeline("object-detection", model=str(folder)), []
    for picture, objects, one in zip(pictures(images), reward.detect(images, asked), asked, strict=True):
        found = sorted(detector(picture, threshold=0.9 if one else 0.3), key=lambda one: -one["score"])
        for name in LABELS.values():
            boxes = [list(one["box"].values()) for one in found if one["label"] == name]
            mine = [[int(side) for side in box.tolist()] for box in objects.get(name, [])]
            assert mine == boxes
        counts.append(len(found))
    assert min(counts) >= 1 and max(counts) > counts[1], "a test of no detection, or of one threshold, says nothing"


def test_a_colour_is_the_nearest_of_clips_mean_descriptions(folder: Path, reward: Geneval) -> None:
    model = CLIPModel.from_pretrained(folder / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    found = set()
    for seed in range(6):
        image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(seed))
        crop = image[None, :, 5:37, 3:35]  # as large as the CLIP has it: nothing is resized
        mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        pixels = (crop - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
        with torch.no_grad():
            vision = model.vision_model(pixel_values=pixels.float()).pooler_output
            seen = torch.nn.functional.normalize(model.visual_projection(vision), dim=-1)[0]
            nearest = []
            for color in COLORS:
                texts = [
                    f"a photo of a {color} cat",
                    f"a photo of a {color}-colored cat",
                    f"a photo of a {color} object",
                ]
                tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
                text = model.text_projection(model.text_model(**tokens).pooler_output)
                mean_text = torch.nn.functional.normalize(text, dim=-1).mean(0)
                nearest.append(float(mean_text @ seen / mean_text.norm()))
        color = COLORS[int(np.argmax(nearest))]
        found.add(color)
        assert reward.color(image, torch.tensor([3.2, 4.9, 35.1, 36.8]), "cat") == color
    assert len(found) > 1


def by_numpy(one: Any, other: Any) -> set[str]:
    """GenEval's rule in numpy: corners in rows."""
    corners = np.array([one, other], dtype=float).reshape(2, 2, 2)
    offset = corners[0].mean(0) - corners[1].mean(0)
    sides = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sides, 0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.sqrt((offset**2).sum())
    return {
        name
        for name, true in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
        if true
    }


def test_boxes_stand_beside_each_other_as_their_centres_do() -> None:
    drawn = np.random.default_rng(0).integers(0, 60, (300, 2, 4))
    boxes = np.concatenate([drawn[..., :2], drawn[..., :2] + 1 + drawn[..., 2:]], axis=-1)
    expected = [by_numpy(*pair) for pair in boxes]
    assert [relations(*torch.tensor(pair, dtype=torch.float32)) for pair in boxes] == expected
    assert {len(one) for one in expected} == {0, 1, 2}


LEFT, RIGHT, LOW = ([0, 20, 10, 30], [50, 20, 60, 30], [50, 60, 60, 70])
SCENE = {"cat": [torch.tensor(LEFT), torch.tensor(LOW)], "dog": [torch.tensor(RIGHT)], "mouse": []}


@pytest.mark.parametrize(
    ("include", "exclude", "held"),
    [
        ([("cat", 2)], [], [True]),
        ([("cat", 2)], [("cat", 2)], [True, False]),
        ([("cat", 3)], [("dog", 2)], [False, True]),
        ([("mouse", 1)], [], [False]),
        ([("cat", 1, {"color": "red"})], [], [True]),  # the surest alone
        ([("cat", 2, {"color": "red"})], [], [False]),
        ([("dog", 1, {"color": "red"})], [], [False]),
        ([("dog", 1), ("cat", 1, {"position": ("left of", 0)})], [], [True, True]),
        ([("dog", 1), ("cat", 1, {"position": ("above", 0)})], [], [True, False]),
        ([("dog", 1), ("cat", 2, {"position": ("left of", 0)})], [], [True, False]),
        ([("mouse", 1), ("cat", 1, {"position": ("left of", 0)})], [], [False, False]),
    ],
)
def test_entries_hold_or_do_not(include: list[Any], exclude: list[Any], held: list[bool]) -> None:
    def entries(some: list[Any]) -> list[dict[str, Any]]:
        return [{"class": name, "label": name, "count": count} | dict(*more) for name, count, *more in some]

    asked = {"include": entries(include), "exclude": entries(exclude)}
    assert entries_held(asked, SCENE, lambda box, name: "red" if box.tolist() == LEFT else "blue") == held


def test_scores_are_all_or_nothing_or_the_share_that_holds(reward: Geneval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "detect", lambda images, metadata: [SCENE] * len(images))
    asked = [
        {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "computer mouse", "count": 1}]},
    ]
    images, prompts = noise(2), ["two cats", "a cat and a mouse"]
    assert reward(images, prompts, asked).tolist() == [1, 0]
    monkeypatch.setattr(reward, "strict", False)
    assert reward(images, prompts, asked).tolist() == [1, 0.5]


def test_what_cannot_be_checked_is_refused(folder: Path, reward: Geneval) -> None:
    image = noise(1)
    with pytest.raises(UserError, match=r"asks for 'zebra'.*allowed: cat, dog, mouse; set reward\.options\.names"):
        reward(image, ["a zebra"], [{"include": [{"class": "zebra", "count": 1}]}])
    with pytest.raises(UserError, match=r"no metadata 'include'; allowed: rows as in GenEval's"):
        reward(image, ["a cat"], [{}])
    blind: Any = load_reward("geneval", {"path": str(folder)}, torch.device("cpu"))
    with pytest.raises(UserError, match=r"color of 'cat'.*set reward\.options\.clip"):
        blind.color(image[0], torch.tensor(LEFT), "cat")
    with pytest.raises(UserError, match=r"reward 'geneval'.*no .*json"):
        load_reward("geneval", {"path": str(folder / "clip")}, torch.device("cpu"))
