"""`report.html`: a search's results as pictures that one can point at."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.colors import qualitative

from rlr_ray.disk import replace_file
from rlr_ray.tune.config import TuneConfig
from rlr_ray.tune.results import Row, best_rows, plain

LENGTH = "estimator.sub_chain.length"  # the key of h
_COLORS = qualitative.D3
_SYMBOLS = {"finished": "circle", "stopped early": "circle-open"}
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd } h2 { margin-top: 2.5rem }"""


def write_report(config: TuneConfig, rows: Sequence[Row], lengths: Mapping[float, int]) -> None:
    """One file that needs no network. `lengths`: the closed form's h* by budget."""
    figures: list[tuple[str, go.Figure]] = [("Reward against memory", _pareto(config, rows))]
    figures += [(f"Reward over {key}", _over(config, rows, key)) for key in config.space]
    figures += [("All keys at once", _parallel(config, rows))]
    if LENGTH in config.space:
        figures += [("Length of the sub-chain for each budget", _lengths(config, rows, lengths))]
    parts = [_head(config), _summary(config, rows)]
    for number, (title, figure) in enumerate(figures):
        figure.update_layout(template="plotly_white", height=460, margin={"t": 30})
        drawn = plotly.io.to_html(figure, full_html=False, include_plotlyjs=number == 0)
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn}")
    text = "\n".join([*parts, "</body></html>"])
    replace_file(config.folder / "report.html", lambda part: part.write_text(text, "utf-8"))


def _head(config: TuneConfig) -> str:
    name = html.escape(config.name)
    return f'<!doctype html><html><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head><body>'


def _summary(config: TuneConfig, rows: Sequence[Row]) -> str:
    """The best of each budget, and what became of all points."""
    best, heads = best_rows(config, rows), ["budget, GiB", "best reward", "peak, GiB", *map(_short, config.space)]
    lines = []
    for budget in config.budgets_gib:
        row, cells = best.get(budget), [f"{budget:g}"]
        if row is None:
            cells += ["none fits"]
        else:
            cells += [f"{row['reward']:.4g} ± {row['reward_se']:.2g}", f"{row['peak_gib']:.4g}"]
            cells += [_cell(row["point"][key]) for key in config.space]
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    states = Counter(row["status"] for row in rows)
    told = ", ".join(f"{count} {status}" for status, count in states.items())
    table = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<h1>{html.escape(config.name)}</h1><p>{len(rows)} points: {told}.</p><table><tr>{table}</tr>{body}</table>"


def _measured(rows: Sequence[Row], budget: float | None = None) -> list[Row]:
    found = [row for row in rows if row["status"] in _SYMBOLS and row["peak_gib"] is not None]
    return [row for row in found if budget in (None, row["budget_gib"])]


def _points(config: TuneConfig, rows: Sequence[Row], key: str | None) -> list[go.Scatter]:
    """Each budget's trials over a key, or over their peak memory; open circles were stopped early."""
    traces = []
    for number, budget in enumerate(config.budgets_gib):
        own = _measured(rows, budget)
        traces.append(
            go.Scatter(
                x=[row["peak_gib"] if key is None else plain(row["point"][key]) for row in own],
                y=[row["reward"] for row in own],
                error_y={"array": [row["reward_se"] for row in own], "thickness": 1},
                mode="markers",
                name=f"{budget:g} GiB",
                marker={
                    "size": 9,
                    "color": _COLORS[number % len(_COLORS)],
                    "symbol": [_SYMBOLS[row["status"]] for row in own],
                },
                text=[_hover(row) for row in own],
            )
        )
    return traces


def _hover(row: Row) -> str:
    point = "<br>".join(f"{_short(key)} {_cell(value)}" for key, value in row["point"].items())
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
        mode="lines",
        line={"shape": "hv", "color": "#888"},
        name="Pareto front",
    )
    for budget in config.budgets_gib:
        figure.add_vline(budget, line_dash="dot", annotation_text=f"{budget:g} GiB")
    return figure.update_layout(xaxis_title="peak memory, GiB", yaxis_title="held-out reward ± standard error")


def _over(config: TuneConfig, rows: Sequence[Row], key: str) -> go.Figure:
    logarithmic = any(name.startswith("log") for name in config.space[key])
    figure = go.Figure(_points(config, rows, key))
    figure.update_xaxes(title=key, type="log" if logarithmic else None)
    return figure.update_layout(yaxis_title="held-out reward ± standard error")


def _parallel(config: TuneConfig, rows: Sequence[Row]) -> go.Figure:
    """A line a trial across all keys, its reward and its peak."""
    found: list[Row] = _measured(rows)
    dimensions: list[dict[str, Any]] = []
    for key in config.space:
        values = [plain(row["point"][key]) for row in found]
        if all(isinstance(value, int | float) for value in values):
            dimensions.append({"label": _short(key), "values": values})
        else:
            texts = sorted({str(value) for value in values})
            places = [texts.index(str(value)) for value in values]
            ticks: dict[str, list[Any]] = {"tickvals": list(range(len(texts))), "ticktext": texts}
            dimensions.append({"label": _short(key), "values": places, **ticks})
    dimensions += [{"label": name, "values": [row[name] for row in found]} for name in ("peak_gib", "reward")]
    line = {"color": [row["reward"] for row in found], "colorscale": "Viridis", "showscale": True}
    return go.Figure(go.Parcoords(dimensions=dimensions, line=line))


def _lengths(config: TuneConfig, rows: Sequence[Row], lengths: Mapping[float, int]) -> go.Figure:
    """The best h of each budget's finished trials beside the closed form's."""
    best = best_rows(config, rows)
    found = {budget: row["point"][LENGTH] for budget, row in best.items()}
    figure = go.Figure(go.Scatter(x=list(found), y=list(found.values()), mode="lines+markers", name="best measured h"))
    drawn = {"mode": "lines+markers", "line_dash": "dash", "name": "h* of the closed form (the paper's equation 8)"}
    figure.add_scatter(x=list(lengths), y=list(lengths.values()), **drawn)
    return figure.update_layout(xaxis_title="memory budget, GiB", yaxis_title="sub-chain length h")


def _short(key: str) -> str:
    return key.split(".", 1)[-1]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plain(value))
