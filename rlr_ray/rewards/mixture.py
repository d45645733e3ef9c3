"""All rewards of a run: built once, called one after the other, standardised and weighted.

m rewards, B images.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score

Standard = tuple[float, float]  # what is taken from a score, and what the rest is divided by


@dataclass(frozen=True)
class WeightedSum:
    """The sum over rewards of `weight * (score - mean) / deviation`, which a run maximises: numbers alone."""

    labels: tuple[str, ...]  # [m]
    weights: tuple[float, ...]  # [m]
    standards: tuple[Standard, ...]  # [m], of the whole run
    standardised: bool = False  # at least one reward is

    def parts(self, scores: Tensor) -> Tensor:  # [m, B] -> [m, B]
        """The summands."""
        weights = scores.new_tensor(self.weights)[:, None]
        mean, deviation = scores.new_tensor(self.standards).T[..., None]
        return weights * (scores - mean) / deviation

    def scores(self, parts: Tensor) -> Tensor:  # [m, B] -> [m, B]
        """The inverse of `parts`."""
        weights = parts.new_tensor(self.weights)[:, None]
        mean, deviation = parts.new_tensor(self.standards).T[..., None]
        return parts / weights * deviation + mean


@dataclass(frozen=True)
class Scored:
    """Every reward's scores of the same images."""

    scores: Tensor  # [m, B]
    replaced: Tensor  # [m, B] which of them were not finite
    seconds: float

    @property
    def invalid(self) -> int:
        """How many were replaced."""
        return int(self.replaced.sum())

    @property
    def measured(self) -> Tensor:  # [m, B]
        """The scores, nan where one was replaced."""
        return self.scores.masked_fill(self.replaced, float("nan"))


@dataclass
class Tally:
    """Sums over the calls that made an update's rewards."""

    invalid: int = 0
    seconds: float = 0.0

    def add(self, scored: Scored) -> None:
        self.invalid += scored.invalid
        self.seconds += scored.seconds


class Mixture:
    """Rewards by label, or judges."""

    def __init__(
        self,
        configs: Mapping[str, Any],
        device: torch.device,
        built: Mapping[str, Callable[..., Tensor]],
        frames: int | None = None,  # of the videos that are scored; None: images are
    ):
        self.configs = dict(configs)
        self.views = {label: view_of(label, config, frames) for label, config in self.configs.items()}
        self.rewards: dict[str, Any] = {
            label: built.get(label) or reward_here(label, config, device) for label, config in self.configs.items()
        }
        self.black_box = tuple(i for i, config in enumerate(self.configs.values()) if not config.has_gradient)

    def to(self, device: torch.device) -> Mixture:
        """Move those that can be moved."""
        for label, reward in self.rewards.items():
            if hasattr(reward, "to"):
                self.rewards[label] = reward.to(device)
        return self

    @functools.cached_property
    def frames(self) -> list[int]:
        """The frames of a video that some reward sees; of images none."""
        return sorted({frame for view in self.views.values() for frame in view.frames})

    @property
    def labels(self) -> list[str]:
        return list(self.configs)

    @property
    def replaces(self) -> bool:
        """Whether a score that is not finite may be replaced."""
        return any(config.invalid != "stop" for config in self.configs.values())

    @property
    def normalized(self) -> list[bool]:
        """True for each reward that is to be standardised."""
        several = len(self.configs) > 1
        return [several if config.normalize is None else config.normalize for config in self.configs.values()]

    def weighted_sum(self, before: Tensor | None = None) -> WeightedSum:  # [m, n], nan where a score was replaced
        """The objective, standardised by the base model's scores `before`; without them all scores as they are.

        Replaced scores have no part in mean and deviation; a reward that does not vary is divided by 1.
        """
        weights = tuple(config.weight for config in self.configs.values())
        standards: list[Standard] = [(0.0, 1.0)] * len(weights)
        if before is None:
            return WeightedSum(tuple(self.configs), weights, tuple(standards))
        for i, row in enumerate(before.double()):
            real = row[~row.isnan()]
            if self.normalized[i] and len(real) > 1:
                standards[i] = float(real.mean()), float(real.std()) or 1.0
        return WeightedSum(tuple(self.configs), weights, tuple(standards), any(self.normalized))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scored:
        """Every reward's scores of images [B, 3, H, W] in [0, 1], or of videos [B, n, 3, H, W].

        A video has all its frames, or those of `frames`. Raises UserError for a score that is not finite, unless the
        reward's `invalid` says what counts instead: then such images are counted, and have no gradient.
        """
        started = time.monotonic()
        rows, marks = [images.new_zeros(0, len(images))], [images.new_zeros(0, len(images), dtype=torch.bool)]
        for label, config in self.configs.items():
            row, wrong = self._score(label, images, prompts, metadata)
            if config.has_gradient and images.requires_grad and torch.is_grad_enabled() and not row.requires_grad:
                raise UserError(
                    f"reward {label!r} says that it is differentiable, but carries no gradient; compute it with torch "
                    "operations outside torch.no_grad(), or set its differentiable: false"
                )
            rows.append((row if config.has_gradient else row.detach())[None])
            marks.append(wrong[None])
        return Scored(torch.cat(rows), torch.cat(marks), time.monotonic() - started)

    def _score(
        self, label: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, Tensor]:  # each [B], the latter which were replaced
        instead, view = self.configs[label].invalid, self.views[label]
        checked = functools.partial(score, self.rewards[label], name=label, finite=instead == "stop")
        wrong = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        if instead == "stop":
            return view.scores(checked, images, prompts, metadata, self.frames), wrong
        seen = images.view_as(images)
        if seen.requires_grad:  # 0 times what is not finite is not 0
            seen.register_hook(lambda gradient: gradient.masked_fill(_beside(wrong, gradient), 0.0))
        scores = view.scores(checked, seen, prompts, metadata, self.frames)
        wrong |= ~scores.isfinite()
        wrong |= ~images.detach().flatten(1).isfinite().all(1)  # of NaN a reward that rounds makes 0
        return scores.masked_fill(wrong, instead), wrong


def _beside(chosen: Tensor, images: Tensor) -> Tensor:  # [B] -> [B, 1, ...]
    return chosen.view(-1, *[1] * (images.dim() - 1))


def reward_here(label: str, config: Any, device: torch.device) -> Callable[..., Tensor]:
    """A reward in this process. Raises UserError if it cannot be built here, though its actors might."""
    try:
        return load_reward(config.name, config.options, device, config.input)
    except UserError as error:
        if config.actors is None:
            raise
        raise UserError(
            f"reward {label!r} has actors of its own, but this command scores in this process, as all but train, plan "
            f"and tune do, and it cannot be built here: {error}; what only the runtime_env of its actors has must be "
            "installed here too"
        ) from error


@dataclass(frozen=True)
class View:
    frames: tuple[int, ...]  # of the whole video; () of an image
    together: bool  # as a video; else one by one, as images

    def scores(
        self,
        score: Callable[..., Tensor],  # of images or videos, prompts and metadata
        images: Tensor,  # [B, 3, H, W], or videos [B, n, 3, H, W] that hold the frames `present`, or all
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        present: Sequence[int],
    ) -> Tensor:  # [B]
        """The scores of what is seen; of frames that are seen one by one, their mean."""
        if not self.frames:
            return score(images, prompts, metadata)
        seen = self.of(images, present)
        if self.together:
            return score(seen, prompts, metadata)
        count = seen.shape[1]
        texts = [text for text in prompts for _ in range(count)]
        data = [one for one in metadata for _ in range(count)]
        return score(seen.flatten(0, 1), texts, data).unflatten(0, (-1, count)).mean(1)

    def of(self, videos: Tensor, present: Sequence[int] = ()) -> Tensor:
        """What is seen of videos that hold the frames `present`, or all."""
        if videos.shape[1] == len(self.frames):
            return videos
        places = self.frames if videos.shape[1] != len(present) else [present.index(frame) for frame in self.frames]
        return videos[:, list(places)]


def view_of(label: str, config: Any, total: int | None) -> View:
    """A reward's view of a model's `total` frames, None if it draws images. Raises UserError if they do not fit."""
    if total is None:
        wanted = "sees videos" if config.sees_video else "has `frames`" if config.frames is not None else None
        if wanted is not None:
            raise UserError(
                f"reward {label!r} {wanted}, but the model draws images; allowed with it: rewards of images; take "
                "another model or another reward"
            )
        return View((), False)
    return View(evenly(total, config.frames or total, label), config.sees_video)


def evenly(total: int, count: int, label: str) -> tuple[int, ...]:
    """The middle frames of as many equal parts of a video."""
    if count > total:
        raise UserError(f"reward {label!r} has frames: {count}; allowed: 1 to {total}, the model's number of frames")
    return tuple((2 * part + 1) * total // (2 * count) for part in range(count))
