"""`report.html`: what a search found, on one page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import plotly.io

from rlr_ray.disk import replace_file
from rlr_ray.tune.config import TuneConfig
from rlr_ray.tune.figures import cell, figures, short
from rlr_ray.tune.results import Row, best_rows

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd } h2 { margin-top: 2.5rem }"""


def write_report(config: TuneConfig, rows: Sequence[Row], lengths: Mapping[float, int]) -> None:
    """One file that needs no network. `lengths`: the closed form's h* by budget."""
    parts = [_head(config), _summary(config, rows)]
    for number, (title, figure) in enumerate(figures(config, rows, lengths).items()):
        figure.update_layout(template="plotly_white", height=460, margin={"t": figure.layout.margin.t or 30})
        drawn = plotly.io.to_html(figure, full_html=False, include_plotlyjs=number == 0)
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn}")
    text = "\n".join([*parts, "<h2>Trials</h2>", _trials(config, rows), "</body></html>"])
    replace_file(config.folder / "report.html", lambda part: part.write_text(text, "utf-8"))


def _head(config: TuneConfig) -> str:
    name = html.escape(config.name)
    return f'<!doctype html><html><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head><body>'


def _summary(config: TuneConfig, rows: Sequence[Row]) -> str:
    """The best of each budget, and what became of all points."""
    best, lines = best_rows(config, rows), []
    for budget in config.budgets_gib:
        row = best.get(budget)
        lines.append([f"{budget:g}", *(_found(row) + _values(config, row) if row else ["none fits"])])
    told = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items())
    heads = ["budget, GiB", "best reward", "peak, GiB", *map(short, config.space)]
    return f"<h1>{html.escape(config.name)}</h1><p>{len(rows)} points: {told}.</p>{_table(heads, lines)}"


def _trials(config: TuneConfig, rows: Sequence[Row]) -> str:
    """Every trial that was launched, the best first; those without a reward last, with what they said."""
    launched = [row for row in rows if row["trial"] is not None]
    launched.sort(key=lambda row: float("inf") if row["reward"] is None else -row["reward"])
    heads = ["trial", "reward", "peak, GiB", *map(short, config.space), "updates", ""]
    lines = []
    for row in launched:
        end = row["status"] if not row["why"] else f"{row['status']}: {row['why']}"
        lines.append([row["trial"], *_found(row), *_values(config, row), cell(row["updates"] or ""), end])
    return _table(heads, lines)


def _found(row: Row) -> list[str]:
    reward = "" if row["reward"] is None else f"{row['reward']:.4g} ± {row['reward_se']:.2g}"
    return [reward, "" if row["peak_gib"] is None else f"{row['peak_gib']:.4g}"]


def _values(config: TuneConfig, row: Row) -> list[str]:
    return [cell(row["point"][key]) for key in config.space]


def _table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in line)}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"
