"""`report.html` of a run, finished or not: one page that needs no network."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml

from rlr_ray.config.describe import clipped_words, describe_plan
from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.curves import Rows
from rlr_ray.loggers.figures import (
    cost_figures,
    distance_figures,
    likeness_figures,
    reward_figures,
    term_figures,
)
from rlr_ray.loggers.page import drawn, facts, table, write_page
from rlr_ray.loggers.shown import Pair, Shown
from rlr_ray.rewards.likeness import LIKENESS, REFERENCES
from rlr_ray.rewards.scores import Scores


def write_report(path: Path, config: RunConfig, rows: Rows, shown: Shown) -> None:
    write_page(path, config.name, report_parts(config, rows, shown, _state(config, shown.summary)))


def report_parts(config: RunConfig, rows: Rows, shown: Shown | None, state: str) -> dict[str, str]:
    """A report's parts in their order, by name; of a run whose start is not measured yet, those that there are."""
    summary = shown.summary if shown else {}
    scores = shown.scores if shown else {}
    kept = shown.kept if shown else 0
    recipe = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    rewards = reward_figures(rows, scores, kept)
    now = "after" if "ran_on" in summary else "now"
    parts = {
        "head": f"<h1>{html.escape(config.name)}</h1><p>{html.escape(state)}</p>",
        "results": "".join(_results(shown, now)) if shown else "",
        "reward": "<h2>Reward</h2>" + drawn(rewards.pop("Reward"), 380, "Reward") + plots(rewards),
        "pictures": f"<h2>Before and {now}, on the same seeds</h2>{_pairs(shown, now)}" if shown else "",
        "facts": "<h2>Plan and cost</h2>" + facts(_facts(config, summary)),
        "terms": section("Terms of the gradient", plots(term_figures(rows))),
        "likeness": section(
            "Pictures without a judge", plots(likeness_figures(rows, summary.get("likeness", {}), kept))
        ),
        "distance": section("Distance and diversity", plots(distance_figures(rows, summary.get("kl_by_step", [])))),
        "cost": section("Throughput and memory", plots(cost_figures(rows))),
        "recipe": f"<details><summary>Resolved config</summary><pre>{html.escape(recipe)}</pre></details>",
    }
    return {name: part for name, part in parts.items() if part}


def warned(texts: Iterable[str]) -> str:
    """Warnings in a box; nothing if there is none."""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<div class="warnings"><strong>Be careful</strong><ul>{items}</ul></div>' if items else ""


def _results(shown: Shown, now: str) -> Iterator[str]:
    """Warnings, held-out scores, and what is measured of pictures without a judge."""
    summary, scores = shown.summary, shown.scores
    yield warned(summary["warnings"])
    yield table(["held-out mean", "before", now, "change ± se"], [_line(*item) for item in scores.items()])
    count = len(scores["reward"].before)
    judges = "" if all(one.trained for one in scores.values()) else " Judges are never trained on."
    yield f"<p>Standard errors are over the differences of {count} pairs of chains with the same seeds.{judges}</p>"
    if summary["likeness"]:
        lines = [_likeness(*item) for measures in summary["likeness"].items() for item in _named(*measures)]
        yield table(["pictures, without a judge", "before", now, "change ± se"], lines)
        yield (
            f"<p>Compared by the features of {html.escape(summary['compared_by'])}; distances are over the reference's "
            "own. Precision falls where pictures are like none of the reference's, recall where they vary less.</p>"
        )


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
        change_words(change, error),
    ]


def change_words(change: float, error: float) -> str:
    return f"{change:+.3g}\u00a0±\u00a0{error:.2g}"


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
    if not summary:
        return
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


def _pairs(shown: Shown, now: str) -> str:
    """The first chains' pictures, with all their scores."""
    cells = []
    for i, pair in enumerate(shown.pairs):
        before = {label: float(score.before[i]) for label, score in shown.scores.items()}
        after = {label: float(score.after[i]) for label, score in shown.scores.items()}
        cells.append(
            captioned(pair, [picture(pair.before, "before", before, pair), picture(pair.after, now, after, pair)])
        )
    return f'<div class="pairs">{"".join(cells)}</div>'


def captioned(pair: Pair, pictures: list[str]) -> str:
    """Pictures of a prompt side by side under it; a long one is cut, and whole under the mouse."""
    said = html.escape(pair.prompt)
    across = f' style="grid-template-columns:repeat({len(pictures)},1fr)"'
    caption = f'<figcaption title="{said}">{said}</figcaption>'
    return f'<figure>{caption}<div class="pair"{across}>{"".join(pictures)}</div></figure>'


def picture(source: str, when: str, scores: Mapping[str, float], pair: Pair) -> str:
    """A picture of a pair, with what it is and its scores below."""
    small = ' class="small"' if pair.small else ""
    said = "".join(f"<br>{html.escape(label)} {score:.4g}" for label, score in scores.items())
    return f'<div><img{small} alt="{html.escape(when)}" src="{html.escape(source)}">{html.escape(when)}{said}</div>'


def plots(figures: Mapping[str, go.Figure]) -> str:
    """Side by side where there is room; a long legend gets more, since it takes a line an entry on a phone."""
    cells = (
        f"<div><h3>{html.escape(title)}</h3>{drawn(figure, _height(figure), title)}</div>"
        for title, figure in figures.items()
    )
    return f'<div class="plots">{"".join(cells)}</div>' if figures else ""


def _height(figure: go.Figure) -> int:
    """In pixels."""
    told = figure.layout.showlegend is not False
    return 280 + 20 * max(len(figure.data) - 4, 0) * told


def section(title: str, body: str) -> str:
    """Nothing without a body."""
    return f"<h2>{title}</h2>{body}" if body else ""
