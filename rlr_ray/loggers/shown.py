"""`report.json`: what a report shows beside recipe and metrics, for pages of a run that goes on and of several."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_ray.loggers.pictures import animated, to_pil
from rlr_ray.rewards.scores import Evaluation, Scores
from rlr_ray.utils.files import replace_file

FILE = "report.json"
SMALL = 128  # pixels; a smaller image is enlarged without smoothing
_EXACT = 256  # pixels up to which an image is kept as it is; forty photos of 1,024 as PNG would take 80 MB


@dataclass(frozen=True)
class Pair:
    """A held-out chain's picture at the start and now, as data URIs."""

    prompt: str
    before: str
    after: str
    small: bool  # so that it is enlarged without smoothing


@dataclass(frozen=True)
class Shown:
    """A run's latest evaluation beside its start."""

    summary: Mapping[str, Any]  # as in summary.json, as far as it is known
    scores: Mapping[str, Scores]
    pairs: Sequence[Pair]  # of the first chains, in the scores' order

    @property
    def kept(self) -> int:
        """Updates done where the scores after were measured."""
        return int(self.summary.get("kept_update", self.summary["steps"]))

    def save(self, folder: Path) -> None:
        scores = {
            label: {"before": one.before.tolist(), "after": one.after.tolist(), "trained": one.trained}
            for label, one in self.scores.items()
        }
        text = json.dumps({"summary": self.summary, "scores": scores, "pairs": [vars(pair) for pair in self.pairs]})
        replace_file(folder / FILE, lambda part: part.write_text(text, "utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Shown | None:
        """None before the start is measured, and of a run of a version that left none."""
        if not (folder / FILE).is_file():
            return None
        saved = json.loads((folder / FILE).read_text("utf-8"))
        scores = {}
        for label, one in saved["scores"].items():
            before, after = (torch.tensor(one[when], dtype=torch.float64) for when in ("before", "after"))
            scores[label] = Scores(before, after, one["trained"])
        return cls(saved["summary"], scores, [Pair(**pair) for pair in saved["pairs"]])


def pairs_of(before: Evaluation, after: Evaluation, prompts: Sequence[str]) -> list[Pair]:
    """Of the chains whose images [n, 3, H, W] in [0, 1], or videos [n, F, 3, H, W], evaluations have."""
    small = max(before.images.shape[-2:]) < SMALL
    return [
        Pair(prompt, _data(one), _data(other), small)
        for one, other, prompt in zip(before.images, after.images, prompts, strict=True)
    ]


def _data(image: Tensor) -> str:
    """An image [3, H, W], or a video [F, 3, H, W], as a data URI: an image that is small as it is."""
    body, frames = io.BytesIO(), to_pil(image)
    if len(frames) > 1:
        for frame in frames:
            frame.thumbnail((_EXACT, _EXACT))
        kind, options = ("gif" if max(frames[0].size) <= SMALL else "webp"), animated(frames)
    elif max(frames[0].size) <= _EXACT:
        kind, options = "png", {}
    else:
        kind, options = "jpeg", {"quality": 90}
    frames[0].save(body, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(body.getvalue()).decode()}"
