"""A run's numbers over its updates as pictures that one can point at; what was not measured is not drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from rlr_ray.core.gradient import TERMS
from rlr_ray.loggers.curves import Point, Rows, columns, held_out_points, likeness_points, points
from rlr_ray.loggers.surrogate import explained_columns
from rlr_ray.rewards.likeness import LIKENESS, REFERENCES
from rlr_ray.rewards.scores import Scores

COLORS = qualitative.D3


def reward_figures(rows: Rows, scores: Mapping[str, Scores], kept: int) -> dict[str, go.Figure]:
    """By title: the trained reward, then each reward and each judge on a scale of its own.

    `kept`: updates done where the scores after were measured.
    """
    held_out = held_out_points(rows, scores, kept)
    labels = [name.removeprefix("reward_").removesuffix("_mean") for name in columns(rows, "reward_", "_mean")]
    figures = {"Reward": _reward("reward_mean", "reward_std", rows, held_out.get("reward", {}))}
    for label in dict.fromkeys([*labels, *held_out]):
        if label != "reward":
            title = label if label not in scores or scores[label].trained else f"{label} (judge)"
            figures[title] = _reward(f"reward_{label}_mean", f"reward_{label}_std", rows, held_out.get(label, {}))
    return figures


def term_figures(rows: Rows) -> dict[str, go.Figure]:
    """By title: each term's size, weight and noise, how the terms agree, and how a surrogate follows the reward."""
    names = _terms(rows)
    norms = {name: f"{name}_norm" for name in names} | {"the sum, as applied": "gradient_norm"}
    drawn = {"Norm, before weighting": _lines(rows, norms)}
    ends = {"Weight": "weight", "Variance": "variance", "Share of noise": "noise_share", "Share clipped": "clipped"}
    for title, end in ends.items():
        drawn[title] = _lines(rows, {name: f"{name}_{end}" for name in names})
    drawn["Learning rate"] = _lines(rows, {"learning rate": "learning_rate"})
    cosines = {f"{one}, {other}": f"cosine_{one}_{other}" for one, other in permutations(names, 2)}
    drawn["Cosine between terms"] = _lines(rows, cosines)
    drawn["Variance that the surrogate explains"] = _lines(rows, explained_columns(rows))
    for title in ("Norm, before weighting", "Variance"):
        _logarithmic(drawn[title])
    return not_empty(drawn)


def distance_figures(rows: Rows, kl_by_step: Sequence[float | None]) -> dict[str, go.Figure]:
    """By title: how far the model went from the base model, now by step too, and how alike its images became."""
    kl = [*_band(rows, "kl", "kl_se", "± standard error"), _line(rows, "kl", "kl", COLORS[0])]
    return not_empty(
        {
            "KL to the base model, nats a chain": titled(go.Figure(kl)),
            "KL by step of the chain, at the end": _by_step(kl_by_step),
            "Diversity of the images": _lines(rows, {"diversity": "diversity"}),
        }
    )


def _by_step(values: Sequence[float | None]) -> go.Figure:
    """A bar a step; none where nothing is known, no figure if all are 0."""
    known = {k: value for k, value in enumerate(values) if value is not None}
    bars = go.Bar(x=list(known), y=list(known.values()), marker={"color": COLORS[0]})
    figure = titled(go.Figure(bars if any(known.values()) else []))
    return figure.update_layout(xaxis={"title": "step, 0 the noisiest"})


def likeness_figures(rows: Rows, likeness: Mapping[str, Mapping[str, Any]], kept: int) -> dict[str, go.Figure]:
    """By title: what is measured of pictures without a judge, by reference. `kept`: updates done at the end."""
    drawn = {}
    for reference, measures in likeness.items():
        start = "" if reference == "base" else f"{reference}_"
        for title, names in (("Precision and recall", ("precision", "recall")), ("Distances", ("nn", "pairwise"))):
            figure = go.Figure()
            for name, color in zip(names, COLORS, strict=False):
                if name in measures:
                    over = likeness_points(rows, measures[name], start + name, kept)
                    figure.add_trace(_traced(over, LIKENESS[name], color))
            drawn[f"{title}, against {REFERENCES[reference]}"] = titled(figure)
    return not_empty(drawn)


def cost_figures(rows: Rows) -> dict[str, go.Figure]:
    """By title: time, rollouts and memory."""
    counts = ("rollouts_missing", "rollouts_rerun", "rollouts_hedged")
    drawn = {
        "Seconds an update": _lines(rows, {"in all": "seconds", "in the reward": "reward_s"}),
        "Rollouts a second": _lines(rows, {"rollouts": "rollouts_per_s"}, zeros=False),
        "Rollout actors": _lines(rows, {"actors": "rollout_actors"}),
        "Share of the denoiser's work by actors": _lines(rows, {"share": "actor_share"}),
        "Rollouts missing, rerun or hedged": _lines(
            rows, {name.removeprefix("rollouts_"): name for name in counts}, zeros=False
        ),
        "Images with an invalid score": _lines(rows, {"images": "reward_invalid"}, zeros=False),
        "Peak memory, GiB": _lines(rows, {"peak": "peak_memory_gib"}),
    }
    for figure in drawn.values():
        figure.update_yaxes(rangemode="tozero")
    return not_empty(drawn)


def _reward(mean: str, deviation: str, rows: Rows, held_out: Mapping[int, Point]) -> go.Figure:
    """Training mean with a band of a standard deviation, and held-out means with their standard errors."""
    figure = go.Figure(list(_band(rows, mean, deviation, "± standard deviation")))
    if any(row.get(mean) is not None for row in rows):
        figure.add_trace(_line(rows, mean, "training chains", COLORS[0]))
    back = [row for row in rows if row.get("stepped_back") and row.get(mean) is not None]
    if back:
        figure.add_scatter(
            x=[row["step"] + 1 for row in back],
            y=[row[mean] for row in back],
            mode="markers",
            name="stepped back",
            marker={"color": COLORS[3], "size": 12, "symbol": "x"},
        )
    figure.add_scatter(
        x=list(held_out),
        y=[value for value, _ in held_out.values()],
        error_y={"array": [error for _, error in held_out.values()], "thickness": 1.5},
        mode="markers",
        name="held-out ± standard error",
        marker={"color": COLORS[1], "size": 8},
    )
    return titled(figure)


def _band(rows: Rows, mean: str, deviation: str, name: str) -> Iterator[go.Scatter]:
    """A deviation on both sides of a mean; nothing without one."""
    measured = [row for row in rows if row.get(mean) is not None and row.get(deviation) is not None]
    for sign in (-1, 1) if measured else ():
        yield go.Scatter(
            x=[row["step"] + 1 for row in measured],
            y=[row[mean] + sign * row[deviation] for row in measured],
            mode="lines",
            line={"width": 0},
            fill="tonexty" if sign == 1 else None,
            fillcolor="rgba(31, 119, 180, .15)",
            name=name,
            showlegend=sign == 1,
            hoverinfo="skip",
        )


def _lines(rows: Rows, columns: Mapping[str, str], *, zeros: bool = True) -> go.Figure:
    """A line a column, by its name; `zeros`: also a column that is 0 throughout."""
    figure = go.Figure()
    for number, (name, column) in enumerate(columns.items()):
        values = [row[column] for row in rows if row.get(column) is not None]
        if values and (zeros or any(values)):
            color = COLORS[number % len(COLORS)]
            figure.add_trace(_line(rows, column, name.replace("_", " "), color))
    return titled(figure) if figure.data else figure


def _line(rows: Rows, column: str, name: str, color: str) -> go.Scatter:
    return _traced(points(rows, column), name, color)


def _traced(over: Mapping[int, float], name: str, color: str) -> go.Scatter:
    mode = "lines" if len(over) > 1 else "markers"
    return go.Scatter(x=list(over), y=list(over.values()), mode=mode, name=name, line={"color": color, "width": 1.5})


def titled(figure: go.Figure, over: str = "updates") -> go.Figure:
    """With what it is drawn over, no wider than its place, and a legend above it where there is something to tell."""
    return figure.update_layout(
        xaxis={"title": over, "automargin": True},
        yaxis={"automargin": True},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=len(figure.data) > 1,
    )


def _logarithmic(figure: go.Figure) -> None:
    if all(value > 0 for trace in figure.data for value in trace.y):
        figure.update_yaxes(type="log")


def not_empty(figures: Mapping[str, go.Figure]) -> dict[str, go.Figure]:
    return {title: figure for title, figure in figures.items() if any(len(trace.x) for trace in figure.data)}


def _terms(rows: Rows) -> list[str]:
    """The estimate's terms in their order, then whatever else has a norm, but the sum."""
    names = [name.removesuffix("_norm") for name in columns(rows, "", "_norm") if name != "gradient_norm"]
    return [*(name for name in TERMS if name in names), *(name for name in names if name not in TERMS)]
