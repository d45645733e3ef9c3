"""What a reward sees of a video: which frames, and whether together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlr_ray.errors import UserError


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
        seen = self._of(images, present)
        if self.together:
            return score(seen, prompts, metadata)
        count = seen.shape[1]
        texts = [text for text in prompts for _ in range(count)]
        data = [one for one in metadata for _ in range(count)]
        return score(seen.flatten(0, 1), texts, data).unflatten(0, (-1, count)).mean(1)

    def _of(self, videos: Tensor, present: Sequence[int]) -> Tensor:
        if videos.shape[1] == len(self.frames):
            return videos
        places = self.frames if videos.shape[1] != len(present) else [present.index(frame) for frame in self.frames]
        return videos[:, list(places)]


def view_of(label: str, config: Any, total: int | None) -> View:
    """Of a reward's config and a model's number of frames, None if it draws images. Raises UserError if they differ."""
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
