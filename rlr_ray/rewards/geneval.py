"""Whether a picture has what its prompt names: so many objects, in these colours, in these places. A black box.

The checks of GenEval (Ghosh et al. 2023, arXiv:2310.11513) over a detector of your choice, without its masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.errors import UserError
from rlr_ray.rewards.clip import Clip, load_clip
from rlr_ray.rewards.hub import Source
from rlr_ray.rewards.images import pictures

Box = Tensor  # [4] left, top, right, bottom, in pixels
Objects = dict[str, list[Box]]  # by class, the surest first
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_NAMES = {"computer keyboard": "keyboard", "computer mouse": "mouse", "tv remote": "remote"}  # GenEval's -> COCO's
_MOST = 16  # objects of a class
_NEAR = 0.1  # of two boxes' sides: what is no further apart stands on no side of the other
_EXAMPLE = '{"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}'


class Geneval(nn.Module):
    """1 for a picture in which all holds that metadata's `include` and `exclude` say, else 0.

    They are as in GenEval's evaluation_metadata.jsonl: classes with `count`, `color` and `position: [relation, number
    of the earlier entry]`, of which there are to be so many at least, or not so many. `path`: a detector of
    transformers (its object-detection pipeline's); `clip`: a CLIP that tells colours. `threshold`: of a detection's
    score, and `counting_threshold` where metadata's `tag` is counting. `names`: of GenEval's classes, where the
    detector's are others. `strict: false` gives the share of entries that hold.
    """

    def __init__(
        self,
        path: str,
        clip: str | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        names: Mapping[str, str] | None = None,
        strict: bool = True,
    ):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        source = Source(
            "geneval", "path", path, path, ["config.json", "preprocessor_config.json", "*.safetensors or *.bin"]
        )
        place = source.folder or path
        with source.explained():
            self.detector = AutoModelForObjectDetection.from_pretrained(place).requires_grad_(False).eval()
            self.processor = AutoImageProcessor.from_pretrained(place)
        self.clip = None if clip is None else Clip(*load_clip("geneval", clip, "openai/clip-vit-large-patch14"))
        self.thresholds = {True: counting_threshold, False: threshold}
        self.labels: list[str] = [label.lower() for _, label in sorted(self.detector.config.id2label.items())]
        self.names, self.strict = {**_NAMES, **(names or {})}, strict

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        scores = []
        for image, objects, prompt, asked in zip(images, self.detect(images, metadata), prompts, metadata, strict=True):
            holds = entries_held(self._asked(prompt, asked), objects, lambda *one, image=image: self.color(image, *one))
            scores.append(float(all(holds)) if self.strict else sum(holds) / len(holds))
        return torch.tensor(scores)

    def detect(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Objects]:
        """The objects of each image [3, H, W] whose score is above its threshold."""
        inputs = self.processor(images=pictures(images), return_tensors="pt").to(self.detector.device)
        sizes = [tuple(images.shape[-2:])] * len(images)
        seen = self.processor.post_process_object_detection(
            self.detector(**inputs), threshold=min(self.thresholds.values()), target_sizes=sizes
        )
        return [
            self._sorted(one, self.thresholds[asked.get("tag") == "counting"])
            for one, asked in zip(seen, metadata, strict=True)
        ]

    def _sorted(self, seen: Mapping[str, Tensor], threshold: float) -> Objects:
        objects: Objects = {}
        for i in seen["scores"].argsort(descending=True, stable=True).tolist():
            same = objects.setdefault(self.labels[int(seen["labels"][i])], [])
            if seen["scores"][i] > threshold and len(same) < _MOST:
                same.append(seen["boxes"][i].cpu())
        return objects

    def color(self, image: Tensor, box: Box, name: str) -> str:
        """Of what is in a box: the colour of which CLIP's mean description is nearest."""
        if self.clip is None:
            raise UserError(
                f"reward 'geneval': metadata asks for the color of {name!r}, which a CLIP tells; set "
                "reward.options.clip to one, e.g. openai/clip-vit-large-patch14 or its folder"
            )
        height, width = image.shape[-2:]
        left, top = (max(min(round(float(box[i])), side - 1), 0) for i, side in ((0, width), (1, height)))
        right, bottom = (max(round(float(box[i])), start + 1) for i, start in ((2, left), (3, top)))
        seen = self.clip.features(image[None, :, top:bottom, left:right])[0]
        texts = [text.format(color=color, name=name) for color in COLORS for text in _TEMPLATES]
        means = self.clip.text_features(texts).unflatten(0, (len(COLORS), -1)).mean(1)
        return COLORS[int((nn.functional.normalize(means, dim=-1) @ seen).argmax())]

    def _asked(self, prompt: str, metadata: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Metadata's entries, with the detector's names as `label`. Raises UserError for what cannot be checked."""
        entries = {kind: [dict(entry) for entry in metadata.get(kind) or ()] for kind in ("include", "exclude")}
        for entry in (*entries["include"], *entries["exclude"]):
            entry["label"] = self.names.get(entry["class"], entry["class"])
            if entry["label"] not in self.labels:
                raise UserError(
                    f"reward 'geneval': prompt {prompt!r} asks for {entry['class']!r}, which the detector does not "
                    f"know; allowed: {', '.join(self.labels)}; set reward.options.names: "
                    f"{{{entry['class']}: ONE OF THESE}}"
                )
        if not entries["include"] and not entries["exclude"]:
            raise UserError(
                f"reward 'geneval': prompt {prompt!r} has no metadata 'include'; allowed: rows as in GenEval's "
                f"evaluation_metadata.jsonl, e.g. {_EXAMPLE}"
            )
        return entries


def entries_held(
    asked: Mapping[str, Sequence[Mapping[str, Any]]], objects: Objects, color: Callable[[Box, str], str]
) -> list[bool]:
    """Whether each entry holds, those of `include` first. Colours and places are asked of the surest objects alone."""
    holding, matched = list[bool](), list[list[Box]]()
    for entry in asked["include"]:
        boxes = objects.get(entry["label"], [])[: entry["count"]]
        holds = len(boxes) == entry["count"]
        if holds and "color" in entry:
            holds = all(color(box, entry["class"]) == entry["color"] for box in boxes)
        if holds and "position" in entry:
            relation, other = entry["position"]
            holds = bool(matched[other]) and all(
                relation in relations(box, to) for box in boxes for to in matched[other]
            )
        holding.append(holds)
        matched.append(boxes if holds else [])
    return holding + [len(objects.get(entry["label"], ())) < entry["count"] for entry in asked["exclude"]]


def relations(box: Box, other: Box) -> set[str]:
    """Where a box stands beside another: the centres' offset, less what is near, is over half of its whole length."""
    offset = ((box[:2] + box[2:]) - (other[:2] + other[2:])) / 2
    near = _NEAR * ((box[2:] - box[:2]) + (other[2:] - other[:2]))
    beyond = (offset.abs() - near).clamp(min=0) * offset.sign()
    if bool((beyond.abs() < 1e-3).all()):
        return set()
    right, down = (beyond / offset.norm()).tolist()
    sides = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, share in sides.items() if share > 0.5}
