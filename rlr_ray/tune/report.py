"""`report.html`: what a search found, on one page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence

from rlr_ray.disk import replace_file
from rlr_ray.page import drawn, page, table
from rlr_ray.tune.config import TuneConfig
from rlr_ray.tune.figures import cell, figures, short
from rlr_ray.tune.results import Row, best_rows


def write_report(config: TuneConfig, rows: Sequence[Row], lengths: Mapping[float, int]) -> None:
    """One file that needs no network. `lengths`: the closed form's h* by budget."""
    parts = [_summary(config, rows)]
    for title, figure in figures(config, rows, lengths).items():
        figure.update_layout(margin={"t": figure.layout.margin.t or 30})
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn(figure)}")
    text = page(config.name, [*parts, "<h2>Trials</h2>", _trials(config, rows)])
    replace_file(config.folder / "report.html", lambda part: part.write_text(text, "utf-8"))


def _summary(config: TuneConfig, rows: Sequence[Row]) -> str:
    """The best of each budget, and what became of all points."""
    best, lines = best_rows(config, rows), []
    for budget in config.budgets_gib:
        row = best.get(budget)
        lines.append([f"{budget:g}", *(_found(row) + _values(config, row) if row else ["none fits"])])
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
        lines.append([row["trial"], *_found(row), *_values(config, row), cell(row["updates"] or ""), end])
    return table(heads, lines)


def _found(row: Row) -> list[str]:
    reward = "" if row["reward"] is None else f"{row['reward']:.4g} ± {row['reward_se']:.2g}"
    return [reward, "" if row["peak_gib"] is None else f"{row['peak_gib']:.4g}"]


def _values(config: TuneConfig, row: Row) -> list[str]:
    return [cell(row["point"][key]) for key in config.space]
