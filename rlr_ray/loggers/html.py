"""`report.html` of a run, finished or not: one page that needs no network."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from torch import Tensor

from rlr_ray.config.describe import clipped_words, describe_plan
from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.figures import (
    Rows,
    cost_figures,
    distance_figures,
    likeness_figures,
    reward_figures,
    term_figures,
)
from rlr_ray.loggers.page import drawn, facts, page, table
from rlr_ray.loggers.pictures import animated, to_pil
from rlr_ray.rewards.likeness import LIKENESS, REFERENCES
from rlr_ray.rewards.scores import Evaluation, Scores
from rlr_ray.utils.files import replace_file

_SMALL = 128  # pixels; a smaller image is enlarged without smoothing
_EXACT = 256  # pixels up to which an image is kept as it is; forty photos of 1,024 as PNG would take 80 MB


def write_report(
    path: Path,
    config: RunConfig,
    rows: Rows,
    summary: Mapping[str, Any],
    scores: Mapping[str, Scores],
    before: Evaluation,
    after: Evaluation,  # the latest one, while the run goes on
    prompts: Sequence[str],  # of the images
) -> None:
    recipe = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    kept, likeness = summary.get("kept_update", len(rows)), summary["likeness"]
    rewards = reward_figures(rows, scores, kept)
    parts = [
        *_head(config, summary, scores),
        "<h2>Reward</h2>",
        drawn(rewards.pop("Reward"), 380),
        _plots(rewards),
        "<h2>Before and after, on the same seeds</h2>",
        _pairs(before.images, after.images, prompts, scores),
        *_section("Terms of the gradient", _plots(term_figures(rows))),
        *_section("Pictures without a judge", _plots(likeness_figures(rows, likeness, kept))),
        *_section("Distance and diversity", _plots(distance_figures(rows, summary["kl_by_step"]))),
        *_section("Throughput and memory", _plots(cost_figures(rows))),
        f"<details><summary>Resolved config</summary><pre>{html.escape(recipe)}</pre></details>",
    ]
    text = page(config.name, parts)
    replace_file(path, lambda part: part.write_text(text, "utf-8"))


def _head(config: RunConfig, summary: Mapping[str, Any], scores: Mapping[str, Scores]) -> Iterator[str]:
    """Name and state, warnings, held-out scores, plan and cost."""
    yield f"<h1>{html.escape(config.name)}</h1><p>{html.escape(_state(config, summary))}</p>"
    if summary["warnings"]:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in summary["warnings"])
        yield f'<div class="warnings"><strong>Be careful</strong><ul>{items}</ul></div>'
    yield table(["held-out mean", "before", "after", "change ± se"], [_line(*item) for item in scores.items()])
    count = len(scores["reward"].before)
    judges = "" if all(one.trained for one in scores.values()) else " Judges are never trained on."
    yield f"<p>Standard errors are over the differences of {count} pairs of chains with the same seeds.{judges}</p>"
    if summary["likeness"]:
        lines = [_likeness(*item) for measures in summary["likeness"].items() for item in _named(*measures)]
        yield table(["pictures, without a judge", "before", "after", "change ± se"], lines)
        yield (
            f"<p>Compared by the features of {html.escape(summary['compared_by'])}; distances are over the reference's "
            "own. Precision falls where pictures are like none of the reference's, recall where they vary less.</p>"
        )
    yield facts(_facts(config, summary))


def _state(config: RunConfig, summary: Mapping[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    if "ran_on" in summary:
        return f"Finished {when} after {summary['steps']} updates, on {summary['ran_on']}."
    return f"Still running: update {summary['steps']} of {config.train.iterations}, {when}."


def _line(label: str, scores: Scores) -> list[str]:
    change, error = scores.change
    name = label if scores.trained else f"{label} (judge)"
    return [
        name,
        *(f"{float(values.mean()):.4g}" for values in (scores.before, scores.after)),
        f"{change:+.3g}\u00a0±\u00a0{error:.2g}",
    ]


def _named(reference: str, measures: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, Mapping[str, float]]]:
    for name, one in measures.items():
        yield f"{LIKENESS[name]}, against {REFERENCES[reference]}", one


def _likeness(name: str, one: Mapping[str, float]) -> list[str]:
    change = f"{one['change']:+.3f}\u00a0±\u00a0{one['change_se']:.3f}"
    return [name, f"{one['before']:.3f}", f"{one['after']:.3f}", change]


def _facts(config: RunConfig, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for line in describe_plan(config).splitlines():
        name, _, text = line.partition(": ")
        yield name, text
    if config.train.learning_rate == "auto" and summary.get("learning_rate") is not None:
        yield "measured learning rate", f"{summary['learning_rate']:g}"
    cost = f"{summary['denoiser_forwards']} denoiser forwards, {summary['denoiser_backwards']} backwards, "
    yield "cost", cost + f"{summary['seconds']:.0f} s"
    if summary["clipped"]:
        yield "clipped", clipped_words(summary["clipped"])
    if summary["steps_off"]:
        yield "steps without the adapter", ", ".join(map(str, summary["steps_off"])) + " (adapter.off_below)"
    if summary["peak_memory_gib"] is not None:
        yield "peak memory", f"{summary['peak_memory_gib']:.3g} GiB"
    if "ran_on" in summary:
        yield "adapter", f"{summary['adapter']}, {summary['trained_numbers']} trained numbers"
        yield "versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())


def _pairs(before: Tensor, after: Tensor, prompts: Sequence[str], scores: Mapping[str, Scores]) -> str:
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


def _plots(figures: Mapping[str, go.Figure]) -> str:
    """Side by side where there is room; a long legend gets more, since it takes a line an entry on a phone."""
    cells = (
        f"<div><h3>{html.escape(title)}</h3>{drawn(figure, 280 + 20 * max(len(figure.data) - 4, 0))}</div>"
        for title, figure in figures.items()
    )
    return f'<div class="plots">{"".join(cells)}</div>' if figures else ""


def _section(title: str, body: str) -> list[str]:
    return [f"<h2>{title}</h2>", body] if body else []
