"""A user's own reward: where its code is, how it is called, and what becomes of all that it does beside scoring."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.images import pictures
from rlr_ray.utils.environment import concealed, expanded, own_module
from rlr_ray.utils.settings import apart

Input = Literal["tensor", "pil"]  # what a reward is shown: images in [0, 1] as a tensor, or as PIL's
_PACKAGE = str(Path(__file__).parents[1])
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def find_own(name: str) -> Callable[..., Any]:
    """The function or class of `module:name` or `file.py:name`. Raises UserError if there is none."""
    place, _, attribute = name.rpartition(":")
    try:
        module = own_module(place)
    except ModuleNotFoundError as error:
        raise UserError(
            f"reward {name!r}: no module {error.name!r} was found; allowed: a module on PYTHONPATH or in the working "
            f"folder, or a file, as folder/file.py:name; run from the folder that holds "
            f"{place.split('.')[0]}.py, set PYTHONPATH, or install {error.name!r}"
        ) from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r}: importing {place} raised {told(error)}") from error
    if not callable(getattr(module, attribute, None)):
        raise UserError(
            f"reward {name!r}: {place} ({module.__file__}) has no function or class {attribute!r}; write it after the "
            "colon"
        )
    return cast(Callable[..., Any], getattr(module, attribute))


def told(error: BaseException) -> str:
    """An error of a user's code: what it is, and the last line of theirs that led to it."""
    what = f"{type(error).__name__}: {concealed(error)}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{what} ({error.filename}, line {error.lineno})"
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith((_PACKAGE, "<"))]
    theirs = [one for one in frames if not one.filename.startswith(LIBRARIES)] or frames
    if not theirs:
        return what
    return f"{what} ({theirs[-1].filename}, line {theirs[-1].lineno}, in {theirs[-1].name})"


def own_reward(name: str, builder: Callable[..., Any], options: dict[str, Any], shown: Input) -> OwnReward:
    """The reward that a function or class of the user's makes. Raises UserError if it cannot be built."""
    values = expanded(options, f"reward {name!r}")
    if not inspect.isclass(builder):
        return OwnReward(name, builder, shown, values)
    try:
        with apart(name.rpartition(":")[0]):
            reward = builder(**values)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r} could not be built with {options}: {told(error)}") from error
    return OwnReward(name, reward, shown, {})


class OwnReward:
    """A reward as this package calls it, whatever it takes; see `arguments_of`.

    It has copies of what it is called with, and settings of its own (`utils/settings.py`), so that nothing of what it
    does to them is seen outside.
    """

    def __init__(self, name: str, reward: Any, shown: Input, options: Mapping[str, Any]):
        self.name, self.reward, self.shown = name, reward, shown
        self.called_with = arguments_of(name, reward, options)
        self.call = functools.partial(reward, **options)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
        seen = images.clone() if self.shown == "tensor" else as_pil(images)
        values = {"images": seen, "prompts": list(prompts), "metadata": [copy.deepcopy(one) for one in metadata]}
        values["videos"] = seen
        with apart(self.name.rpartition(":")[0]):
            if isinstance(self.called_with, int):
                return self.call(*list(values.values())[: self.called_with])
            return self.call(**{name: values[name] for name in self.called_with})

    def to(self, device: torch.device) -> OwnReward:
        """Moved, if it can be."""
        if hasattr(self.reward, "to"):
            self.reward = self.reward.to(device)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("reward"), name)


_NAMES = ("images", "prompts", "metadata")


def arguments_of(name: str, reward: Any, options: Mapping[str, Any]) -> int | list[str]:
    """How many of images, prompts and metadata a reward is called with; or which, where it names its parameters so.

    Options are not asked for again, nor are parameters with a default other than None. Raises UserError for a reward
    that cannot be called with these.
    """
    call = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        parameters = [one for key, one in inspect.signature(call).parameters.items() if key not in options]
    except (TypeError, ValueError):  # some that are written in C do not say
        return len(_NAMES)
    kinds = {one.kind for one in parameters}
    plain = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    needed = [one for one in plain if one.default is one.empty]
    known = [one.name for one in plain if one.name in (*_NAMES, "videos") and one.kind is not one.POSITIONAL_ONLY]
    if known and {one.name for one in needed} <= {*known}:
        more = _NAMES[1:] if inspect.Parameter.VAR_KEYWORD in kinds else ()
        return list(dict.fromkeys([*known, *more]))
    places = [one for one in plain if one.kind is not one.KEYWORD_ONLY]
    moved = any(one.name in _NAMES and _NAMES.index(one.name) != place for place, one in enumerate(places))
    if moved or len(needed) > len(_NAMES) or {one.kind for one in needed} & {inspect.Parameter.KEYWORD_ONLY}:
        raise UserError(
            f"reward {name!r} must be called with {', '.join(one.name for one in needed)}; allowed: images, prompts "
            "and metadata, or the first of them in this order, or any of them by these names; give others as "
            "reward.options, or a default"
        )
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return len(_NAMES)
    asked = [*itertools.takewhile(lambda one: one.default is one.empty or one.default is None, places)]
    if not asked:
        raise UserError(f"reward {name!r} takes no images; give it a first parameter `images`")
    return min(len(asked), len(_NAMES))


def as_pil(images: Tensor) -> list[Any]:
    """images [B, 3, H, W] in [0, 1], or a list of frames for each of videos [B, F, 3, H, W]."""
    return pictures(images) if images.dim() == 4 else [pictures(video) for video in images]


_SCORES = ("scores", "score", "rewards", "reward")


def scores_in(returned: Any, name: str) -> Tensor:
    """The scores in what a reward returned. Raises UserError, with its kind, if there are none.

    Allowed: numbers in a tensor, an array or a list; (scores, info) with a dictionary or None for info; a dictionary
    with one of `scores`, `score`, `rewards`, `reward`.
    """
    scores = returned
    if isinstance(scores, tuple) and len(scores) == 2 and (scores[1] is None or isinstance(scores[1], Mapping)):
        scores = scores[0]
    if isinstance(scores, Mapping):
        keys = [key for key in _SCORES if key in scores]
        if len(keys) != 1:
            raise _refused(name, f"a dictionary with the keys {', '.join(map(repr, scores)) or 'none'}")
        scores = scores[keys[0]]
    if isinstance(scores, list | tuple) and scores and all(isinstance(one, Tensor) for one in scores):
        scores = torch.stack([one.squeeze() for one in scores])  # else their gradients would be lost
    try:
        values = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(name, f"{type(scores).__name__} ({str(error) or 'no numbers'})") from error
    if values.is_complex():
        raise _refused(name, "complex numbers")
    return values


def _refused(name: str, what: str) -> UserError:
    return UserError(
        f"reward {name!r} returned {what}; allowed: one number an image in a tensor, an array or a list, alone, as "
        "(scores, info), or in a dictionary under 'scores'"
    )
