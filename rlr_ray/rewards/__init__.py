"""Rewards: the table of those that are here, and a user's own by `module:name`, which may be a class or a function.

A reward is called with `images [B, 3, H, W] in [0, 1]`, `prompts` (B strings) and `metadata` (B dicts) and returns
scores [B], higher is better. A differentiable one lets gradients pass from the scores to the images. One of videos is
called with `videos [B, F, 3, H, W]` instead; any other rates a video's frames as images, and the video by their mean.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.images import kind_of
from rlr_ray.rewards.own import Input, find_own, own_reward, scores_in, told
from rlr_ray.utils.environment import expanded


class Entry(NamedTuple):
    """A reward without its code, which takes seconds to import."""

    place: str  # file:Class of this folder
    differentiable: bool = True
    video: bool = False


REWARDS = {
    "aesthetic": Entry("aesthetic:Aesthetic"),
    "clipscore": Entry("clip:ClipScore"),
    "digits": Entry("digits:Digits"),
    "digits_judge": Entry("digits:DigitsJudge", differentiable=False),
    "dynamic_degree": Entry("motion:DynamicDegree", video=True),
    "geneval": Entry("geneval:Geneval", differentiable=False),
    "hpsv2": Entry("hpsv2:Hpsv2"),
    "http": Entry("http:Http", differentiable=False),
    "imagereward": Entry("imagereward:ImageReward"),
    "jpeg_compressibility": Entry("jpeg:JpegCompressibility", differentiable=False),
    "jpeg_incompressibility": Entry("jpeg:JpegIncompressibility", differentiable=False),
    "motion_smoothness": Entry("motion:MotionSmoothness", video=True),
    "moving_digits": Entry("moving_digits:MovingDigits", video=True),
    "moving_digits_judge": Entry("moving_digits:MovingDigitsJudge", differentiable=False, video=True),
    "ocr": Entry("ocr:Ocr", differentiable=False),
    "pickscore": Entry("clip:PickScore"),
    "sfw": Entry("sfw:Sfw", differentiable=False),
    "vlm": Entry("vlm:Vlm", differentiable=False),
    "vqa": Entry("vqa:Vqa", differentiable=False),
}


def find_reward(name: str) -> Callable[..., Any]:
    """The class or function that `name` stands for, not yet built. Raises UserError if there is none."""
    if name in REWARDS:
        file, _, attribute = REWARDS[name].place.partition(":")
        return cast(Callable[..., Any], getattr(importlib.import_module(f"{__name__}.{file}"), attribute))
    if ":" in name:
        return find_own(name)
    raise UserError(
        f"reward {name!r} is not known; allowed: {', '.join(REWARDS)}, "
        "or your own as 'module:function', e.g. 'my_rewards:brightness' for a file my_rewards.py in this folder"
    )


def is_differentiable(name: str, stated: bool | None = None) -> bool:
    """True if first order may pass through a reward: what the recipe states, else the table, else its own attribute."""
    return _fact(name, "differentiable") if stated is None else stated


def is_video(name: str, stated: bool | None = None) -> bool:
    """True if a reward sees videos: what the recipe states, else the table, else its own attribute."""
    return _fact(name, "video") if stated is None else stated


def _fact(name: str, key: Literal["differentiable", "video"]) -> bool:
    """Imports a reward that is not in the table. Raises UserError if that fails."""
    if name in REWARDS:
        return bool(getattr(REWARDS[name], key))
    try:
        return bool(getattr(find_reward(name), key, False))
    except UserError as error:
        raise UserError(
            f"{error}; for a reward that only its own actors can import, state `{key}` in the recipe"
        ) from error


def load_reward(
    name: str, options: dict[str, Any], device: torch.device, shown: Input = "tensor"
) -> Callable[..., Tensor]:
    """Build a reward and move it to the device, if it can be moved. Raises UserError for options it does not take.

    `${NAME}` in an option stands for a variable of this process's environment.
    """
    builder = find_reward(name)
    signature = inspect.signature(builder)
    try:
        (signature.bind if inspect.isclass(builder) else signature.bind_partial)(**options)
    except TypeError as error:
        raise UserError(f"reward {name!r} does not take reward.options {sorted(options)}: {error}") from error
    of_package = name in REWARDS and shown == "tensor"
    reward = (
        builder(**expanded(options, f"reward {name!r}")) if of_package else own_reward(name, builder, options, shown)
    )
    built: Callable[..., Tensor] = reward.to(device) if hasattr(reward, "to") else reward
    return built


def score(
    reward: Callable[..., Tensor],
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    name: str,
    *,
    finite: bool = True,
) -> Tensor:  # [B]
    """Call a reward and check what it returns: scores [B], `finite` if they must be.

    Raises UserError otherwise, or if the call fails.
    """
    try:
        returned = reward(images, prompts, metadata)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward {name!r} raised {told(error)}; it is called with {kind_of(images)}s {list(images.shape)} in "
            f"[0, 1], {len(prompts)} prompts and as many metadata dictionaries"
        ) from error
    scores = scores_in(returned, name).to(images.device)
    if scores.shape != (len(images),):
        one = "an image" if kind_of(images) == "image" else "a video"
        raise UserError(
            f"reward {name!r} returned shape {list(scores.shape)} for {len(images)} {kind_of(images)}s; allowed: "
            f"[{len(images)}], one score {one}; remove a mean over the batch or a trailing dimension"
        )
    if finite and not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise UserError(
            f"reward {name!r} returned {scores[bad].item()} for {kind_of(images)} {bad} (prompt {prompts[bad]!r}); "
            "allowed: finite numbers; clamp logarithms and divisions inside the reward, or say what such an image gets "
            "in the reward's `invalid`"
        )
    return scores.to(images.dtype)
