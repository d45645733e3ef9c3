"""Pictures that a run leaves: grids before and after, and the reward's curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from PIL import Image
from torch import Tensor

from rlr_ray.disk import replace_file

matplotlib.use("Agg")
from matplotlib import pyplot

_COLUMNS = 5
_SMALLEST = 96  # pixels a picture's side is enlarged to


def save_comparison(
    path: Path, before: Tensor, after: Tensor, titles: Sequence[str], before_title: str, after_title: str
) -> None:
    """Before-and-after pairs of images [n, 3, H, W] in [0, 1], the prompt above each pair."""
    columns = min(_COLUMNS, len(before))
    rows = math.ceil(len(before) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.4 * columns, 1.5 * rows + 0.7), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, one, other, title in zip(axes.flat, before, after, titles, strict=False):
        gap = numpy.ones((one.shape[1], max(one.shape[2] // 8, 1), 3))
        axis.imshow(numpy.concatenate([_array(one), gap, _array(other)], axis=1), interpolation="nearest")
        axis.set_title(_cut(title), fontsize=8, parse_math=False)
    figure.suptitle(f"{before_title}   →   {after_title}", fontsize=10)
    _finish(figure, path)


def save_columns(path: Path, images: Mapping[str, Tensor], titles: Sequence[str]) -> None:
    """A column of images [n, 3, H, W] in [0, 1] for each name, a row a chain, its prompt before it."""
    columns, rows = len(images), len(titles)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.5 * columns + 1.5, 1.5 * rows + 0.3), squeeze=False)
    for column, (name, own) in enumerate(images.items()):
        axes[0, column].set_title(_cut(name), fontsize=8)
        for axis, image in zip(axes[:, column], own, strict=True):
            axis.imshow(_array(image), interpolation="nearest")
            axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_ylabel(_cut(title), rotation=0, ha="right", va="center", fontsize=8)
    _finish(figure, path)


def save_grid(path: Path, images: Tensor) -> None:
    """Images [n, 3, H, W] in [0, 1] in rows, enlarged without smoothing if they are small."""
    height, width = images.shape[-2:]
    factor = max(1, _SMALLEST // min(height, width))
    columns = min(_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (columns * width * factor, rows * height * factor), "white")
    for index, image in enumerate(images):
        tile = to_pil(image)
        place = (index % columns * width * factor, index // columns * height * factor)
        canvas.paste(tile.resize((width * factor, height * factor), Image.Resampling.NEAREST), place)
    replace_file(path, lambda part: canvas.save(part, format="PNG"))


def save_reward_curve(path: Path, rows: Sequence[dict[str, Any]], held_out: dict[int, tuple[float, float]]) -> None:
    """Training reward over updates, with the held-out mean and standard error by number of updates."""
    figure, axis = pyplot.subplots(figsize=(7, 4))
    axis.plot([row["step"] + 1 for row in rows], [row["reward_mean"] for row in rows], label="training chains", lw=1)
    steps, values = list(held_out), list(held_out.values())
    means, errors = [mean for mean, _ in values], [error for _, error in values]
    axis.errorbar(steps, means, errors, fmt="o", capsize=3, label="held-out chains ± standard error")
    axis.set(xlabel="updates", ylabel="reward")
    axis.grid(alpha=0.3)
    axis.legend()
    _finish(figure, path)


def _cut(title: str) -> str:
    return title if len(title) <= 26 else title[:25] + "…"


def to_pil(image: Tensor) -> Image.Image:
    """Of an image [3, H, W] in [0, 1]."""
    return Image.fromarray((_array(image) * 255).round().astype(numpy.uint8))


def _array(image: Tensor) -> numpy.ndarray:  # [H, W, 3]
    return image.permute(1, 2, 0).clamp(0, 1).numpy()


def _finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    replace_file(path, lambda part: figure.savefig(part, dpi=130, format="png"))
    pyplot.close(figure)
