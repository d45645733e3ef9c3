"""Pictures that a run leaves: grids before and after, as they move if they are videos, and the reward's curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from rlr_ray.utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES_A_SECOND = 8
_DPI = 130
_COLUMNS = 5
_SMALLEST = 96  # pixels a picture's side is enlarged to
_SHOWN = 192  # pixels to which a video's sides are reduced among others
_WIDEST = 1600  # pixels to which the sides of a GIF are reduced


def save_comparison(
    stem: Path, before: Tensor, after: Tensor, titles: Sequence[str], before_title: str, after_title: str
) -> None:
    """Before-and-after pairs of images [n, 3, H, W] in [0, 1], or videos [n, F, 3, H, W], with their prompts."""
    columns = min(_COLUMNS, len(before))
    rows = math.ceil(len(before) / columns)
    figure = _figure((2.4 * columns, 1.5 * rows + 0.7), _DPI)
    axes = figure.subplots(rows, columns, squeeze=False)
    shown = []
    for axis in axes.flat:
        axis.axis("off")
    for axis, one, other, title in zip(axes.flat, before, after, titles, strict=False):
        gap = one.new_ones(*one.shape[:-1], max(one.shape[-1] // 8, 1))
        shown.append((axis, torch.cat([one, gap, other], dim=-1)))
        axis.set_title(_cut(title), fontsize=8, parse_math=False)
    figure.suptitle(f"{before_title}   →   {after_title}", fontsize=10, parse_math=False)
    _save_shown(figure, shown, stem)


def save_columns(stem: Path, images: Mapping[str, Tensor], titles: Sequence[str]) -> None:
    """A column of images [n, 3, H, W] in [0, 1], or videos [n, F, 3, H, W], for each name, a row a chain."""
    columns, rows = len(images), len(titles)
    figure = _figure((1.5 * columns + 1.5, 1.5 * rows + 0.3), _DPI)
    axes = figure.subplots(rows, columns, squeeze=False)
    shown = []
    for column, (name, column_images) in enumerate(images.items()):
        axes[0, column].set_title(_cut(name), fontsize=8, parse_math=False)
        for axis, image in zip(axes[:, column], column_images, strict=True):
            shown.append((axis, image))
            axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_ylabel(_cut(title), rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
    _save_shown(figure, shown, stem)


def save_grid(stem: Path, images: Tensor) -> Path:
    """Images [n, 3, H, W] in [0, 1], or videos [n, F, 3, H, W], in rows, as .png or .gif; small ones are enlarged."""
    height, width = images.shape[-2:]
    factor = max(1, _SMALLEST // min(height, width))
    columns = min(_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    canvas = images.new_ones(*images.shape[1:-2], rows * height, columns * width)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        canvas[..., top : top + height, left : left + width] = image
    if factor > 1:
        canvas = canvas.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return save_picture(stem, canvas)


def to_show(images: Tensor) -> Tensor:
    """Images [n, 3, H, W] as they are; videos [n, F, 3, H, W] with sides of 192 pixels at most, which are many more."""
    factor = _SHOWN / max(images.shape[-2:])
    if images.dim() == 4 or factor >= 1:
        return images
    small = interpolate(images.flatten(0, 1), scale_factor=factor, mode="bilinear", antialias=True)
    return small.unflatten(0, images.shape[:2])


def save_picture(stem: Path, image: Tensor) -> Path:
    """An image [3, H, W] in [0, 1] as .png, a video [F, 3, H, W] as .gif."""
    return _save_frames(stem, to_pil(image))


def _save_frames(stem: Path, frames: Sequence[Image.Image]) -> Path:
    kind, options = "PNG", {}
    if len(frames) > 1:
        kind, options = "GIF", animated(frames)
        for frame in frames:
            frame.thumbnail((_WIDEST, _WIDEST))
    path = stem.with_name(f"{stem.name}.{kind.lower()}")
    replace_file(path, lambda part: frames[0].save(part, format=kind, **options))
    return path


def animated(frames: Sequence[Image.Image]) -> dict[str, Any]:
    """Options for Pillow to save frames beside the first one, at so many a second that motion is seen."""
    return {"save_all": True, "append_images": frames[1:], "duration": 1000 // FRAMES_A_SECOND, "loop": 0}


def save_reward_curve(path: Path, rows: Sequence[dict[str, Any]], held_out: dict[int, tuple[float, float]]) -> None:
    """Training reward and steps back over updates, and the held-out mean and standard error by number of updates."""
    figure = _figure((7, 4))
    axis = figure.subplots()
    axis.plot([row["step"] + 1 for row in rows], [row["reward_mean"] for row in rows], label="training chains", lw=1)
    back = [row for row in rows if row.get("stepped_back")]
    if back:
        axis.plot([row["step"] + 1 for row in back], [row["reward_mean"] for row in back], "rX", label="stepped back")
    steps, values = list(held_out), list(held_out.values())
    means, errors = [mean for mean, _ in values], [error for _, error in values]
    axis.errorbar(steps, means, errors, fmt="o", capsize=3, label="held-out chains ± standard error")
    axis.set(xlabel="updates", ylabel="reward")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    replace_file(path, lambda part: figure.savefig(part, dpi=_DPI, format="png"))


def _cut(title: str) -> str:
    return title if len(title) <= 26 else title[:25] + "…"


def to_pil(image: Tensor) -> list[Image.Image]:
    """An image [3, H, W] in [0, 1], or a video [F, 3, H, W] frame by frame."""
    frames = image.unsqueeze(0) if image.dim() == 3 else image
    return [Image.fromarray((_array(frame) * 255).round().astype(numpy.uint8)) for frame in frames]


def _array(image: Tensor) -> numpy.ndarray:  # [H, W, 3]
    return image.permute(1, 2, 0).clamp(0, 1).numpy()


def _save_shown(figure: Figure, shown: Sequence[tuple[Any, Tensor]], stem: Path) -> None:
    """Draw an image, or a video, in each axis, and save the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    videos = [image.unsqueeze(0) if image.dim() == 3 else image for _, image in shown]
    drawn = [
        axis.imshow(_array(video[0]), interpolation="nearest") for (axis, _), video in zip(shown, videos, strict=True)
    ]
    canvas = FigureCanvasAgg(figure)
    figure.tight_layout()
    frames = []
    for number in range(len(videos[0])):
        for artist, video in zip(drawn, videos, strict=True):
            artist.set_data(_array(video[number]))
        canvas.draw()
        frames.append(Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB"))
    _save_frames(stem, frames)


def _figure(inches: tuple[float, float], dpi: float | None = None) -> Figure:
    from matplotlib.figure import Figure  # here: no first update waits for it

    return Figure(inches, dpi)
