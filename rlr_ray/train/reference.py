"""Features that pictures are compared by, and the real pictures that held-out ones are compared with."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlr_ray.errors import UserError
from rlr_ray.rewards.digits import WORDS, named, real_digits
from rlr_ray.rewards.images import read_picture
from rlr_ray.rewards.likeness import NEIGHBOURS, Pictures, Reference
from rlr_ray.rewards.mixture import View
from rlr_ray.train.engine import Engine
from rlr_ray.utils.environment import path_of

_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_AT_ONCE = 100  # pictures whose features are computed together

Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W], or videos [B, F, 3, H, W] -> [B, D]


def picture_features(engine: Engine) -> tuple[str, Features]:
    """The name and the function of the features that pictures are compared by; by Euclidean distance.

    Those of evaluation.clip; else of the first judge, then of the first reward, that has a method `features(images)` in
    this process; else pixels, averaged down to sides of 16 at most. Videos frame by frame, but where a reward of videos
    has them.
    """
    if engine.clip is not None:
        return "clip", _by_frame(engine.clip.features)
    for mixture in (engine.judges, engine.rewards):
        for label, reward in mixture.rewards.items():
            if inspect.ismethod(getattr(reward, "features", None)):  # a network's own part of that name is no method
                return label, partial(_of_reward, label, reward.features, mixture.views[label])
    return "pixels", _by_frame(_pixels)


def _pixels(images: Tensor) -> Tensor:
    """Distances are the root of the mean squared difference."""
    height, width = images.shape[-2:]
    small = adaptive_avg_pool2d(images, (min(height, 16), min(width, 16))).flatten(1)
    return small / math.sqrt(small.shape[1])


def _of_reward(label: str, features_of: Features, view: View, images: Tensor) -> Tensor:
    frames = view.of(images) if view.frames else images
    features = features_of(frames) if view.together else _by_frame(features_of)(frames)
    if features.dim() != 2 or len(features) != len(images) or not bool(features.isfinite().all()):
        raise UserError(
            f"reward {label!r}: its features(images) returned shape {list(features.shape)} for {len(images)} pictures; "
            f"allowed: [{len(images)}, D], finite numbers; mend the method, or take it out, and pixels count"
        )
    return features.float()


def _by_frame(features_of: Features) -> Features:
    """The features of a video's F frames one after the other, over the root of F: squared distances are means."""

    def features(images: Tensor) -> Tensor:
        if images.dim() == 4:
            return features_of(images)
        frames = features_of(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return frames.flatten(1) / math.sqrt(images.shape[1])

    return features


def numbered(texts: Sequence[str]) -> Tensor:  # [n]
    """Each text's place among the different ones."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([places[text] for text in texts])


@torch.no_grad()
def real_reference(engine: Engine) -> Reference | None:
    """The pictures of evaluation.reference, if the recipe names one. Raises UserError if there are none to compare."""
    source = engine.config.evaluation.reference
    if source is None:
        return None
    if engine.model.frames is not None:
        raise UserError(
            "evaluation.reference names pictures, but the model draws videos; allowed: nothing; leave it out, or take "
            "a model of images"
        )
    prompts = list(dict.fromkeys(prompt.text for prompt in engine.held_out_prompts))
    images, prompt_of = _digits(prompts) if source == "digits" else _folder(Path(source), prompts, _size(engine))
    if len(images) <= NEIGHBOURS:
        raise UserError(
            f"evaluation.reference: {source} has {len(images)} pictures; allowed: {NEIGHBOURS + 1} or more, better as "
            "many as evaluation.chains"
        )
    features_of, _ = picture_features(engine)[1], engine.judges.to(engine.device)
    features = torch.cat([features_of(part.to(engine.device)).cpu() for part in images.split(_AT_ONCE)])
    engine.judges.to(torch.device("cpu"))
    if prompt_of is None:
        return Reference(Pictures(features, torch.zeros(len(features))), by_prompt=False)
    return Reference(Pictures(features, prompt_of))


def _size(engine: Engine) -> tuple[int, int]:  # H, W
    """Size of the model's pictures."""
    latent = torch.zeros(1, *engine.model.latent_shape, device=engine.device)
    height, width = engine.model.decode(latent).shape[-2:]
    return height, width


def _digits(prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:  # [N, 3, 16, 16], [N]
    """The shipped real digits that the prompts name, and by which, if no two name the same."""
    images, labels = real_digits()
    digits = named("digit", WORDS, prompts)
    chosen = torch.isin(labels, digits)
    images, labels = images[chosen], labels[chosen]
    if len(digits.unique()) < len(digits):
        return images, None
    return images, (labels[:, None] == digits).int().argmax(1)


def _folder(folder: Path, prompts: Sequence[str], size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """A folder's pictures [N, 3, *size]; and their prompts [N] if they lie in folders named like these."""
    folder = path_of(str(folder))
    if not folder.is_dir():
        raise UserError(
            f"evaluation.reference: {folder} is no folder here; allowed: digits, or a folder of pictures "
            f"({', '.join(_KINDS)}), which may lie in folders named like the held-out prompts"
        )
    named_like = {_letters(path.name): path for path in sorted(folder.iterdir()) if path.is_dir()}
    if not named_like:
        return _read(_files(folder), size), None
    files = [_files(named_like[_letters(text)]) if _letters(text) in named_like else [] for text in prompts]
    if not any(files):
        raise UserError(
            f"evaluation.reference: of the folders in {folder} ({', '.join(sorted(named_like)[:5])}) none is named "
            f"like a held-out prompt and has pictures ({', '.join(_KINDS)}); allowed: names like {prompts[0]!r}, or "
            "all pictures in the folder itself"
        )
    prompt_of = torch.tensor([place for place, part in enumerate(files) for _ in part])
    return _read([file for part in files for file in part], size), prompt_of


def _letters(text: str) -> str:
    """A prompt as a folder's name can have it: its words in lower case, joined by hyphens."""
    return "-".join(re.findall(r"\w+", text.lower()))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _KINDS)


def _read(files: Sequence[Path], size: tuple[int, int]) -> Tensor:  # [N, 3, H, W] in [0, 1]
    """Pictures, cut to the shape that is asked for about their centres, and scaled."""
    images = []
    for file in files:
        try:
            fitted = ImageOps.fit(read_picture(file), size[::-1], Image.Resampling.BICUBIC)
        except ValueError as error:
            raise UserError(
                f"evaluation.reference: {file} cannot be read as a picture: {error}; replace it, or take it away"
            ) from error
        images.append(torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1) / 255)
    return torch.stack(images) if images else torch.zeros(0, 3, *size)
