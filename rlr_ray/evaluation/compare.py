"""Several runs on one page: their curves, what came of each, how their recipes differ, their pictures side by side."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch

from rlr_ray.config.base import flat
from rlr_ray.evaluation.followed import Followed, duration
from rlr_ray.loggers.curves import Point, Rows, held_out_points, likeness_points, points, spent
from rlr_ray.loggers.figures import COLORS, not_empty, titled
from rlr_ray.loggers.html import captioned, change_words, picture, plots, section, warned
from rlr_ray.loggers.page import table
from rlr_ray.rewards.likeness import LIKENESS, REFERENCES
from rlr_ray.rewards.scores import mean_and_error

_WORK = "denoiser forwards, a backward as two"
_FEW = 6  # runs whose pictures stand side by side
_MARKS = {"solid": "●", "dash": "◐", "dot": "○"}  # of lines
_UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
_SMOOTH = 20  # parts of a run: a mean over one is a point of its training curve


def comparison_parts(runs: Sequence[Followed]) -> dict[str, str]:
    """The page's parts in their order, by name."""
    warnings = [f"{run.name}: {text}" for run in runs for text in run.summary.get("warnings", ())]
    names = ", ".join(run.name for run in runs) if len(runs) <= _FEW else f"{len(runs)} runs"
    parts = {
        "head": f"<h1>{html.escape(names)}</h1>{_states(runs)}",
        "results": section("What came of them", _results(runs)),
        "reward": section("Reward", plots(_rewards(runs)) + _curves_note(runs)),
        "pictures": section("Before and after, on the same seeds", _pictures(runs)),
        "measures": section(f"Over {_WORK}", plots(_measures(runs))),
        "recipes": section("What differs in their recipes", _differences(runs)),
        "warnings": section("Warnings", warned(warnings)),
    }
    return {name: part for name, part in parts.items() if part}


def _states(runs: Sequence[Followed]) -> str:
    """How far each run is, beside the mark of its lines."""
    lines = (
        f'<tr><td><span style="color:{style["color"]}">{_MARKS[style["dash"]]}</span> {html.escape(run.name)}</td>'
        f"<td>{html.escape(run.state)}</td></tr>"
        for run, style in _styled(runs)
    )
    return f'<table class="facts">{"".join(lines)}</table>'


def _results(runs: Sequence[Followed]) -> str:
    """A column a run, or of many a line; what no run has anything to say of is left out."""
    begun = [run for run in runs if run.summary.get("steps")]
    cells = [_result(run, runs[0]) for run in begun]
    if not cells:
        return ""
    note = "<p>± are standard errors over held-out chains"
    if any(_beyond(run, runs[0]) for run in begun):
        note += f"; against {html.escape(runs[0].name)}: after, chain by chain, on the same seeds"
    heads = dict.fromkeys(head for each in cells for head in each)
    lines = [["", *(run.name for run in begun)], *([head, *(each.get(head, "") for each in cells)] for head in heads)]
    lines = lines if len(begun) <= _FEW else [list(column) for column in zip(*lines, strict=True)]
    return table(lines[0], lines[1:]) + f"{note}.</p>"


def _result(run: Followed, first: Followed) -> dict[str, str]:
    """By heading, of a run that has begun."""
    summary = run.summary
    cells = {"updates": f"{summary['steps']}"}
    cells["held-out reward"] = f"{summary['reward_before']:.4g} → {summary['reward_after']:.4g}"
    cells |= {"gain ± se": change_words(summary["gain"], summary["gain_se"])} | _beyond(run, first)
    for label, one in summary["scores"].items():
        name = f"{label} (judge)" if label in summary["judges"] else label
        cells[name] = f"{one['before']:.3g} → {one['after']:.3g}"
    if summary["kl"] is not None:
        cells["KL, nats"] = f"{summary['kl']:.3g}"
    for reference, measures in summary.get("likeness", {}).items():
        for name in ("precision", "recall"):
            if name in measures:
                cells[f"{name}, against {REFERENCES[reference]}"] = (
                    f"{measures[name]['before']:.2f} → {measures[name]['after']:.2f}"
                )
    cells["denoiser forwards"] = f"{summary['denoiser_forwards']:,}"
    cells["denoiser backwards"] = f"{summary['denoiser_backwards']:,}"
    cells["time of updates"] = duration(summary["seconds"])
    if summary["peak_memory_gib"] is not None:
        cells["peak memory, GiB"] = f"{summary['peak_memory_gib']:.3g}"
    return cells


def _beyond(run: Followed, first: Followed) -> dict[str, str]:
    """The difference of rewards after, of pairs of chains, if both were measured on the same ones."""
    if run is first or run.shown is None or first.shown is None:
        return {}
    one, other = run.shown.scores["reward"], first.shown.scores["reward"]
    if not torch.equal(one.before, other.before):
        return {}
    return {f"against {first.name} ± se": change_words(*mean_and_error(one.after - other.after))}


def _rewards(runs: Sequence[Followed]) -> dict[str, go.Figure]:
    """The reward over updates, over work and over time."""
    return not_empty(
        {
            "Over updates": _reward(runs, "updates"),
            "Over denoiser work": _reward(runs, _WORK),
            "Over time": _reward(runs, f"{_unit(runs)[0]} of updates"),
        }
    )


def _curves_note(runs: Sequence[Followed]) -> str:
    if not any(run.rows for run in runs):
        return ""
    return (
        f"<p>Points: held-out chains ± standard error. Thin lines: training chains, means over a "
        f"{_SMOOTH}th of the updates. Evaluations are in neither work nor time.</p>"
    )


def _reward(runs: Sequence[Followed], over: str) -> go.Figure:
    figure, (_, seconds) = go.Figure(), _unit(runs)
    for run, style in _styled(runs):
        place = _places(run.rows, over, seconds)
        smooth = _smooth(points(run.rows, "reward_mean"))
        figure.add_scatter(
            x=[place[step] for step in smooth],
            y=list(smooth.values()),
            mode="lines",
            line={**style, "width": 1},
            opacity=0.45,
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_trace(_measured(run, _held_out(run).get("reward", {}), place, style))
    return _finished(figure, over, runs)


def _measures(runs: Sequence[Followed]) -> dict[str, go.Figure]:
    """By title, over work: judges, rewards alone, KL, and pictures without a judge."""
    labels = dict.fromkeys(label for run in runs for label in _held_out(run) if label != "reward")
    figures = {label: _over_work(runs, {run.name: _held_out(run).get(label, {}) for run in runs}) for label in labels}
    kl = {run.name: {step: (value, 0.0) for step, value in points(run.rows, "kl").items()} for run in runs}
    figures["KL to the base model, nats a chain"] = _over_work(runs, kl)
    for reference, start in (("base", ""), ("real", "real_")):
        for name in ("precision", "recall", "pairwise"):
            title = f"{LIKENESS[name].capitalize()}, against {REFERENCES[reference]}"
            figures[title] = _over_work(runs, {run.name: _likeness(run, reference, name, start + name) for run in runs})
    return not_empty(figures)


def _likeness(run: Followed, reference: str, name: str, column: str) -> dict[int, Point]:
    measure = run.summary.get("likeness", {}).get(reference, {}).get(name)
    if measure is None:
        return {}
    kept = int(run.summary.get("kept_update", run.summary["steps"]))
    return {step: (value, 0.0) for step, value in likeness_points(run.rows, measure, column, kept).items()}


def _over_work(runs: Sequence[Followed], known: Mapping[str, Mapping[int, Point]]) -> go.Figure:
    figure = go.Figure()
    for run, style in _styled(runs):
        figure.add_trace(_measured(run, known[run.name], _places(run.rows, _WORK, 1.0), style))
    return _finished(figure, _WORK, runs)


def _measured(
    run: Followed, known: Mapping[int, Point], place: Mapping[int, float], style: Mapping[str, str]
) -> go.Scatter:
    """Measurements by number of updates, at their place, with their errors if there are any."""
    steps = [step for step in known if step in place]
    errors = [known[step][1] for step in steps]
    return go.Scatter(
        x=[place[step] for step in steps],
        y=[known[step][0] for step in steps],
        error_y={"array": errors, "thickness": 1} if any(errors) else None,
        mode="lines+markers",
        name=run.name,
        line={**style, "width": 2},
        marker={"size": 6},
    )


def _finished(figure: go.Figure, over: str, runs: Sequence[Followed]) -> go.Figure:
    return titled(figure, over).update_layout(showlegend=1 < len(runs) <= _FEW)


def _held_out(run: Followed) -> dict[str, dict[int, Point]]:
    scores, kept = (run.shown.scores, run.shown.kept) if run.shown else ({}, 0)
    return held_out_points(run.rows, scores, kept)


def _places(rows: Rows, over: str, seconds: float) -> dict[int, float]:
    """Where a number of updates lies on the axis; `seconds` in its unit of time."""
    units = spent(rows)
    if over == "updates":
        return {step: float(step) for step in units["seconds"]}
    return units["forwards"] if over == _WORK else {step: one / seconds for step, one in units["seconds"].items()}


def _unit(runs: Sequence[Followed]) -> tuple[str, float]:
    """Of time, and its seconds: so that the longest run is no large number of them."""
    longest = max((max(spent(run.rows)["seconds"].values()) for run in runs), default=0.0)
    return next((name, seconds) for name, seconds in _UNITS.items() if longest >= 2 * seconds or seconds == 1)


def _smooth(values: Mapping[int, float]) -> dict[int, float]:
    """Means over parts of a run, by the middle of each."""
    steps, size = list(values), max(len(values) // _SMOOTH, 1)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return {part[len(part) // 2]: sum(values[step] for step in part) / len(part) for part in parts}


def _styled(runs: Sequence[Followed]) -> Iterator[tuple[Followed, dict[str, str]]]:
    """A color a run; where there are more, their lines are broken."""
    for number, run in enumerate(runs):
        again, color = divmod(number, len(COLORS))
        yield run, {"color": COLORS[color], "dash": list(_MARKS)[again % len(_MARKS)]}


def _differences(runs: Sequence[Followed]) -> str:
    """A line for each key whose values differ, a column a run."""
    recipes = [flat(run.config.model_dump(mode="json", exclude={"name", "output_dir"})) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    lines = []
    for key in keys:
        values = [_value(recipe[key]) if key in recipe else "" for recipe in recipes]
        if len(set(values)) > 1:
            lines.append([".".join(key), *values])
    if not lines:
        return "<p>Nothing.</p>" if len(runs) > 1 else ""
    return table(["key", *(run.name for run in runs)], lines)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pictures(runs: Sequence[Followed]) -> str:
    """Of each prompt: the base model's picture once where runs share it, and each run's; of many runs the best few."""
    shown = [run for run in runs if run.shown and run.shown.summary["steps"]]
    best = sorted(shown, key=lambda run: -run.summary["gain"])[:_FEW]
    shown = [run for run in shown if run in best]
    if not shown:
        return ""
    alike = len({tuple((pair.prompt, pair.before) for pair in _pairs(run)) for run in shown}) == 1
    groups = [shown] if alike else [[run] for run in shown]
    note = f"<p>The {_FEW} runs of highest gain.</p>" if len(best) < sum(bool(run.shown) for run in runs) else ""
    return note + "".join(_group(group, named=not alike) for group in groups)


def _group(runs: Sequence[Followed], *, named: bool) -> str:
    """Pictures of runs that began with the same ones."""
    cells = []
    for i, pair in enumerate(_pairs(runs[0])):
        columns = [picture(pair.before, "before", _scores(runs[0], i, "before"), pair)]
        for run in runs:
            columns.append(picture(_pairs(run)[i].after, run.name, _scores(run, i, "after"), pair))
        cells.append(captioned(pair, columns))
    head = f"<h3>{html.escape(runs[0].name)}</h3>" if named else ""
    wide = f' style="--wide:{min(7.5 * (1 + len(runs)), 66):g}rem"'
    return f'{head}<div class="pairs"{wide}>{"".join(cells)}</div>'


def _pairs(run: Followed) -> Sequence[Any]:
    return run.shown.pairs if run.shown else ()


def _scores(run: Followed, chain: int, when: str) -> dict[str, float]:
    scores: Iterable[tuple[str, Any]] = run.shown.scores.items() if run.shown else ()
    return {label: float(getattr(one, when)[chain]) for label, one in scores}
