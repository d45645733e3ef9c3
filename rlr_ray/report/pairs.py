"""Images before and after on the same seeds, each with its scores."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from torch import Tensor

from rlr_ray.pictures import animated, to_pil
from rlr_ray.report.scores import Scores

_SMALL = 128  # pixels; a smaller image is enlarged without smoothing
_EXACT = 256  # pixels up to which an image is kept as it is; forty photos of 1,024 as PNG would take 80 MB


def pairs(before: Tensor, after: Tensor, prompts: Sequence[str], scores: Mapping[str, Scores]) -> str:
    """Images [n, 3, H, W] in [0, 1], or videos [n, F, 3, H, W], of the first chains, and the scores of all."""
    figures = []
    for i, (one, other, prompt) in enumerate(zip(before, after, prompts, strict=True)):
        left = _image(one, "before", {label: float(score.before[i]) for label, score in scores.items()})
        right = _image(other, "after", {label: float(score.after[i]) for label, score in scores.items()})
        said = html.escape(prompt)  # a long one is cut, and whole under the mouse
        caption = f'<figcaption title="{said}">{said}</figcaption>'
        figures.append(f'<figure>{caption}<div class="pair">{left}{right}</div></figure>')
    return f'<div class="pairs">{"".join(figures)}</div>'


def _image(image: Tensor, when: str, scores: Mapping[str, float]) -> str:
    small = ' class="small"' if max(image.shape[-2:]) < _SMALL else ""
    said = "<br>".join(f"{html.escape(label)} {score:.4g}" for label, score in scores.items())
    return f'<div><img{small} alt="{when}" src="{_data(image)}">{when}<br>{said}</div>'


def _data(image: Tensor) -> str:
    """An image [3, H, W], or a video [F, 3, H, W], as a data URI: an image that is small as it is."""
    body, frames = io.BytesIO(), to_pil(image)
    if len(frames) > 1:
        for frame in frames:
            frame.thumbnail((_EXACT, _EXACT))
        kind, options = ("gif" if max(frames[0].size) <= _SMALL else "webp"), animated(frames)
    elif max(frames[0].size) <= _EXACT:
        kind, options = "png", {}
    else:
        kind, options = "jpeg", {"quality": 90}
    frames[0].save(body, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(body.getvalue()).decode()}"
