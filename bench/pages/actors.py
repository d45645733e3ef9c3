"""What actors do of an update and of its time: measured, and computed for many GPUs from measured costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.common import IMAGES, MACHINE, mean_se, read_json, table, text
from bench.pages.sweeps import runs_by_variant

# On paper: a chain of as many steps as Stable Diffusion's usual ones, on so many GPUs
CLUSTERS, STEPS = (8, 64, 1024), 50
CHUNK_S = 10.0  # of sampling a chunk without a gradient, on one GPU
CHUNKS_AN_ACTOR = 2
PARAMETERS, BANDWIDTH = 5_000_000, 10e9  # of the adapter; bytes a second between nodes


def actors() -> str:
    """Shares by preset, times by number of actors, and the forecast."""
    facts, scale = read_json("actors.json"), read_json("scale.json")
    if facts is None or scale is None:
        return "Not measured yet: `python -m bench.speed.actors`."
    shares = [[name, f"{one['before']:.0%}", f"{one['after']:.0%}"] for name, one in facts["shares"].items()]
    costs = costs_of(facts, scale)
    draw(costs)
    return text("actors").format(
        machine=MACHINE,
        ray=facts["ray"],
        chains=facts["chains"],
        chunk=facts["chunk"],
        shares=table(("preset", "before", "now"), shares),
        times=table(TIME_HEADS, _times(facts["rows"])),
        ahead=_ahead(),
        ahead_time=_ahead_over_time(),
        forecast=table(FORECAST_HEADS, [_forecast(gpus, costs) for gpus in CLUSTERS]),
        **costs,
        chunk_s=CHUNK_S,
        steps=STEPS,
        million=PARAMETERS / 1e6,
        gigabytes=BANDWIDTH / 1e9,
    )


TIME_HEADS = ("preset", "actors", "updates a minute over those without", "trainer's CPU, s an update", "actors' share")


def _times(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Medians over the turns; ratios within each."""
    lines = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        alone = [row["seconds"] for row in rows if row["preset"] == preset and row["actors"] == 0]
        for count in sorted({row["actors"] for row in rows}):
            some = [row for row in rows if row["preset"] == preset and row["actors"] == count]
            ratios = [before / row["seconds"] for before, row in zip(alone, some, strict=True)]
            spread = "" if not count else f" ({min(ratios):.1f} to {max(ratios):.1f})"
            cpu = statistics.median(row["trainer_cpu_s"] for row in some)
            share = statistics.mean(row["share"] for row in some)
            lines.append([preset, str(count), f"{statistics.median(ratios):.1f}{spread}", f"{cpu:.2f}", f"{share:.0%}"])
    return lines


def costs_of(facts: Mapping[str, Any], scale: Mapping[str, Any]) -> dict[str, float]:
    """A chunk's gradient over its sampling, of the forward term, by forwards and backwards; a call's milliseconds."""
    sampled, steps = facts["shares"]["awm"]["after"], facts["steps"]
    over_ray = [row for row in scale["rows"] if row["calls"] == "dispatcher over Ray" and not row["spread"]]
    per_call = [row["coordinator_cpu_s"] / row["actors"] for row in over_ray if row["actors"] >= 256]
    return {"gradient": (1 - sampled) / sampled * steps / STEPS, "call_ms": 1000 * statistics.median(per_call)}


def step_s(actors: int, workers: int, chunks: int, costs: Mapping[str, float], *, ahead: bool = False) -> float:
    """Seconds of an update of the forward term: its chunks sampled by actors and workers, then its gradients.

    Calls are made one after the other by each worker for its own chunks; ahead, sampling by actors alone and the
    gradients run side by side. The sum of gradients, 2 P integers of 64 bits, goes round a ring of workers.
    """
    calls = chunks / workers * costs["call_ms"] / 1000
    gradients = math.ceil(chunks / workers) * CHUNK_S * costs["gradient"]
    ring = 2 * 16 * PARAMETERS / BANDWIDTH if workers > 1 else 0.0
    if ahead and actors:
        return max(math.ceil(chunks / actors) * CHUNK_S + calls, gradients + ring)
    return math.ceil(chunks / (actors + workers)) * CHUNK_S + calls + gradients + ring


FORECAST_HEADS = (
    *("GPUs", "workers", "actors", "chunks an update", "calls, s", "update, s", "chunks a GPU and minute"),
    *("update with ahead: 1, s", "chunks a GPU and minute then"),
)


def _forecast(gpus: int, costs: Mapping[str, float]) -> list[str]:
    """So many workers that gradients take about as long as sampling on the others."""
    workers = max(round(gpus * costs["gradient"] / (1 + costs["gradient"])), 1)
    count = gpus - workers
    chunks = CHUNKS_AN_ACTOR * count
    seconds, ahead = (step_s(count, workers, chunks, costs, ahead=early) for early in (False, True))
    cells = [str(gpus), str(workers), str(count), str(chunks), f"{chunks / workers * costs['call_ms'] / 1000:.2f}"]
    rates = (60 * chunks / gpus / each for each in (seconds, ahead))
    before, then = (f"{rate:.2f}" for rate in rates)
    return [*cells, f"{seconds:.1f}", before, f"{ahead:.1f}", then]


def draw(costs: Mapping[str, float]) -> None:
    """The forward term's update of 64 chunks against the number of actors of one worker."""
    counts = [0, 1, 2, 4, 8, 16, 32, 64]
    figure = Figure((6, 3.2))
    axis = figure.subplots()
    for ahead, color in ((False, "tab:blue"), (True, "tab:orange")):
        seconds = [step_s(count, 1, 64, costs, ahead=ahead) for count in counts]
        axis.plot(range(len(counts)), seconds, marker="o", color=color, label=f"ahead: {int(ahead)}")
    axis.axhline(64 * CHUNK_S * costs["gradient"], color="grey", lw=0.8, ls="--", label="gradients alone")
    axis.set_xticks(range(len(counts)), list(map(str, counts)))
    axis.set_xlabel("rollout actors beside one worker")
    axis.set_ylabel("update of 64 chunks, s")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGES / "actors.png", dpi=110)


def _ahead() -> str:
    """Gains at equal forwards, by plan."""
    groups = runs_by_variant("ahead")
    if not groups:
        return "Not measured yet: `python -m bench.runs.sweep ahead`."
    lines = []
    for variant, runs in groups.items():
        gains = [[run["gain"] for run in runs if run["ahead"] == ahead] for ahead in (0, 1)]
        if all(gains):
            lines.append([variant, str(len(gains[1])), *(mean_se(values) for values in gains)])
    return table(("plan", "seeds", "gain, ahead: 0", "gain, ahead: 1"), lines)


def _ahead_over_time() -> str:
    """Gains of the forward term at equal time, from those at equal updates and the seconds of an update."""
    facts, runs = read_json("ahead_time.json"), runs_by_variant("ahead").get("forward term (awm)", [])
    if facts is None or not runs:
        return "Over time: not measured yet, `python -m bench.speed.ahead`."
    per_update = [statistics.median(one for turn in facts["turns"] for one in turn[str(ahead)]) for ahead in (0, 1)]
    lines = []
    for updates in (5, 10, 15, 20, 25):
        seconds = updates * per_update[0]
        reached = (updates, (seconds - facts["sampling_s"]) / per_update[1])  # ahead, the first chains are waited for
        gains = [[_gain(run, reached[ahead]) for run in runs if run["ahead"] == ahead] for ahead in (0, 1)]
        counts = [f"{count:.0f}" for count in reached]
        lines.append(
            [f"{seconds:.0f}", *(f"{mean_se(gain)} ({count})" for gain, count in zip(gains, counts, strict=True))]
        )
    heads = ("seconds", "gain, ahead: 0 (updates)", "gain, ahead: 1 (updates)")
    zero, one = per_update
    return text("ahead_time").format(rows=table(heads, lines), zero=zero, one=one, **facts).strip()


def _gain(run: Mapping[str, Any], updates: float) -> float:
    """Between the points of its curve."""
    points = sorted((int(step), float(reward)) for step, reward in run["curve"].items())
    steps, rewards = zip(*points, strict=True)
    return float(np.interp(updates, steps, rewards)) - rewards[0]
