"""The figures of docs/scaling.md."""

from __future__ import annotations

import statistics

import chaos  # beside this file, as the next
from page import MACHINE, read_json, table

SCALE = """`python bench/scale.py` (Ray {ray}; {machine}, which the hosts of the simulated actors share with the
coordinator): steps of one chunk of {rollout_s:g} s for each actor, and of two that take 20 % more or less, with 2 %
stragglers of three times that and 1 % of actors dying half-way and coming back after 5 s. Coordinator: CPU seconds of
the process that dispatches, submission and results included.

{rows}

On the wire, besides one theta for each node and step: {wire:.0f} bytes a rollout (chunks of {pairs_per_chunk} pairs).
Real actors on the demo's job, the same work each: 2 take {two:.2f} s where 1 takes {one:.2f} s (medians of 3): a weak
scaling efficiency of {efficiency:.2f}.
"""


def scale() -> str:
    facts = read_json("scale.json")
    if facts is None:
        return "Not measured yet: `python bench/scale.py`."
    rows = []
    for row in facts["rows"]:
        kind = "as they come" if row["spread"] else "equal"
        hedging = "on" if row["hedge"] else "off"
        cells = [str(row["actors"]), kind, hedging, f"{row['seconds']:.2f}", f"{row['ideal']:g}"]
        over = f"{row['seconds'] / row['ideal'] - 1:+.1%}"
        rows.append([*cells, over, f"{row['coordinator_cpu_s']:.2f}", str(row["rollouts_rerun"])])
    heads = ("actors", "durations", "hedging", "step, s", "ideal, s", "beyond it", "coordinator, s", "rollouts rerun")
    times = {
        count: statistics.median(row["seconds"] for row in facts["weak_scaling"] if row["actors"] == count)
        for count in (1, 2)
    }
    return SCALE.format(
        machine=MACHINE,
        rows=table(heads, rows),
        one=times[1],
        two=times[2],
        efficiency=times[1] / times[2],
        **facts["bytes"],
        **facts,
    )


def kills() -> str:
    rows = chaos.read()
    if not rows:
        return "Not measured yet: `python bench/chaos.py`."
    return f"`python bench/chaos.py` ({MACHINE}):\n\n{chaos.chaos_table(rows)}"
