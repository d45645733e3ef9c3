"""`report.html`: what a search found, on one page."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from rlr_ray.config.tune import TuneConfig
from rlr_ray.loggers.page import drawn, table, write_page
from rlr_ray.tune.results import Row, best_rows, plain

_LENGTH = "estimator.sub_chain.length"  # the key of h
_COLORS = qualitative.D3
_SYMBOLS = {"finished": "circle", "stopped early": "circle-open"}


def write_report(config: TuneConfig, rows: Sequence[Row]) -> None:
    """One file that needs no network."""
    parts = {"summary": _summary(config, rows)}
    for title, figure in figures(config, rows).items():
        figure.update_layout(margin={"t": figure.layout.margin.t or 30})
        parts[title] = f"<h2>{html.escape(title)}</h2>{drawn(figure)}"
    parts["trials"] = "<h2>Trials</h2>" + _trials(config, rows)
    write_page(config.folder / "report.html", config.name, parts)


def _summary(config: TuneConfig, rows: Sequence[Row]) -> str:
    """The best of each budget, and what became of all points."""
    best, lines = best_rows(config, rows), []
    for budget in config.budgets_gib:
        row = best.get(budget)
        lines.append([f"{budget:g}", *(_cells(row) + _values(config, row) if row else ["none fits"])])
    told = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items())
    heads = ["budget, GiB", "best reward", "peak, GiB", *map(short, config.space)]
    return f"<h1>{html.escape(config.name)}</h1><p>{len(rows)} points: {told}.</p>{table(heads, lines)}"


def _trials(config: TuneConfig, rows: Sequence[Row]) -> str:
    """Every trial that was launched, the best first; those without a reward last, with what they said."""
    launched = [row for row in rows if row["trial"] is not None]
    launched.sort(key=lambda row: float("inf") if row["reward"] is None else -row["reward"])
    heads = ["trial", "reward", "peak, GiB", *map(short, config.space), "updates", ""]
    lines = []
    for row in launched:
        end = row["status"] if not row["why"] else f"{row['status']}: {row['why']}"
        lines.append([row["trial"], *_cells(row), *_values(config, row), cell(row["updates"] or ""), end])
    return table(heads, lines)


def _cells(row: Row) -> list[str]:
    reward = "" if row["reward"] is None else f"{row['reward']:.4g} ± {row['reward_se']:.2g}"
    return [reward, "" if row["peak_gib"] is None else f"{row['peak_gib']:.4g}"]


def _values(config: TuneConfig, row: Row) -> list[str]:
    return [cell(row["point"][key]) for key in config.space]


def figures(config: TuneConfig, rows: Sequence[Row]) -> dict[str, go.Figure]:
    """By title."""
    drawn = {"Reward against memory": _pareto(config, rows)}
    drawn |= {f"Reward over {key}": _over(config, rows, key) for key in config.space}
    drawn["All keys at once"] = _parallel(config, rows)
    if _LENGTH in config.space:
        drawn["Length of the sub-chain for each budget"] = _lengths(config, rows)
    return drawn


def short(key: str) -> str:
    return key.split(".", 1)[-1]


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plain(value))


def _measured(rows: Sequence[Row], budget: float | None = None) -> list[Row]:
    measured = [row for row in rows if row["status"] in _SYMBOLS and row["peak_gib"] is not None]
    return [row for row in measured if budget in (None, row["budget_gib"])]


def _points(config: TuneConfig, rows: Sequence[Row], key: str | None) -> list[go.Scatter]:
    """Each budget's trials over a key, or over their peak memory; open circles were stopped early."""
    traces = []
    for number, budget in enumerate(config.budgets_gib):
        trials = _measured(rows, budget)
        traces.append(
            go.Scatter(
                x=[row["peak_gib"] if key is None else plain(row["point"][key]) for row in trials],
                y=[row["reward"] for row in trials],
                error_y={"array": [row["reward_se"] for row in trials], "thickness": 1},
                mode="markers",
                name=f"{budget:g} GiB",
                marker={
                    "size": 9,
                    "color": _COLORS[number % len(_COLORS)],
                    "symbol": [_SYMBOLS[row["status"]] for row in trials],
                },
                text=[_hover(row) for row in trials],
            )
        )
    return traces


def _hover(row: Row) -> str:
    point = "<br>".join(f"{short(key)} {cell(value)}" for key, value in row["point"].items())
    return f"{row['trial']}, {row['status']}<br>{point}"


def _pareto(config: TuneConfig, rows: Sequence[Row]) -> go.Figure:
    figure = go.Figure(_points(config, rows, None))
    front, highest = [], float("-inf")
    for row in sorted(
        (row for row in _measured(rows) if row["status"] == "finished"),
        key=lambda row: (row["peak_gib"], -row["reward"]),
    ):
        if row["reward"] > highest:
            highest = row["reward"]
            front.append(row)
    figure.add_scatter(
        x=[row["peak_gib"] for row in front],
        y=[row["reward"] for row in front],
        mode="lines+markers",
        line={"shape": "hv", "color": "#888"},
        marker={"size": 15, "symbol": "circle-open", "color": "#888"},
        name="Pareto front",
    )
    for budget in config.budgets_gib:
        figure.add_vline(budget, line_dash="dot", annotation_text=f"{budget:g} GiB")
    _add_untrained(figure, rows)
    return figure.update_layout(xaxis_title="peak memory, GiB", yaxis_title="held-out reward ± standard error")


def _add_untrained(figure: go.Figure, rows: Sequence[Row]) -> None:
    """A line at the base model's reward, if all trials are judged on the same chains."""
    before = {round(row["reward"] - row["gain"], 5) for row in rows if row["gain"] is not None}
    if len(before) == 1:
        figure.add_hline(before.pop(), line_dash="dash", line_color="#bbb", annotation_text="base model")


def _logarithmic(config: TuneConfig, key: str) -> bool:
    return any(name.startswith("log") for name in config.space[key])


def _over(config: TuneConfig, rows: Sequence[Row], key: str) -> go.Figure:
    figure = go.Figure(_points(config, rows, key))
    figure.update_xaxes(title=key, type="log" if _logarithmic(config, key) else None)
    _add_untrained(figure, rows)
    return figure.update_layout(yaxis_title="held-out reward ± standard error")


def _parallel(config: TuneConfig, rows: Sequence[Row]) -> go.Figure:
    """A line a trial across all keys, its reward and its peak."""
    trials = _measured(rows)
    dimensions = [
        _axis([plain(row["point"][key]) for row in trials], _logarithmic(config, key)) for key in config.space
    ]
    dimensions = [{"label": short(key)} | axis for key, axis in zip(config.space, dimensions, strict=True)]
    dimensions += [{"label": name, "values": [row[name] for row in trials]} for name in ("peak_gib", "reward")]
    line = {"color": [row["reward"] for row in trials], "colorscale": "Viridis", "showscale": True}
    return go.Figure(go.Parcoords(dimensions=dimensions, line=line)).update_layout(margin_t=80)


def _axis(values: Sequence[Any], logarithmic: bool) -> dict[str, Any]:
    """Places on an axis of parallel coordinates, which knows numbers on a linear scale alone."""
    if not all(isinstance(value, int | float) for value in values):
        texts = sorted({str(value) for value in values})
        return {
            "values": [texts.index(str(value)) for value in values],
            "tickvals": list(range(len(texts))),
            "ticktext": texts,
        }
    if not logarithmic:
        return {"values": list(values)}
    places = [math.log10(value) for value in values]
    ticks = sorted({*places}) if len({*places}) < 6 else [min(places), (min(places) + max(places)) / 2, max(places)]
    return {"values": places, "tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}


def _lengths(config: TuneConfig, rows: Sequence[Row]) -> go.Figure:
    """The best h of each budget's finished trials."""
    best = best_rows(config, rows)
    lengths = [row["point"][_LENGTH] for row in best.values()]
    figure = go.Figure(go.Scatter(x=list(best), y=lengths, mode="lines+markers"))
    return figure.update_layout(xaxis_title="memory budget, GiB", yaxis_title="sub-chain length h")
