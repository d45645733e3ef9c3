"""The figures of docs/scaling.md, and an update's extra memory."""

from __future__ import annotations

import statistics
from typing import Any

from bench.common import MACHINE, read_json, read_rows, table, text
from bench.runs import chaos


def scale() -> str:
    facts = read_json("scale.json")
    if facts is None:
        return "Not measured yet: `python -m bench.speed.scale`."
    lines = []
    for row in facts["rows"]:
        kind = "as they come" if row["spread"] else "equal"
        cells = [row["calls"], str(row["actors"]), kind, "on" if row["hedge"] else "off", f"{row['seconds']:.2f}"]
        cpu = [f"{row['coordinator_cpu_s']:.2f}", f"{row['hosts_cpu_s']:.2f}"]
        lines.append([*cells, f"{row['ideal']:.2f}", f"{_beyond(row):+.1%}", *cpu, str(row.get("rollouts_rerun", 0))])
    heads = ("by", "actors", "durations", "hedging", "step, s", "ideal, s", "beyond it", "coordinator's CPU, s")
    times = {
        count: statistics.median(row["seconds"] for row in facts["weak_scaling"] if row["actors"] == count)
        for count in (1, 2)
    }
    most = facts["rows"][0]["actors"]
    equal = {
        calls: [row for row in facts["rows"] if row["calls"] == calls and row["actors"] == most and not row["spread"]]
        for calls in ("dispatcher alone", "Ray alone", "dispatcher over Ray")
    }
    alone, bare, both = (statistics.median(map(_beyond, rows)) for rows in equal.values())
    coordinator, hosts = (
        1000 * statistics.median(row[cpu] for row in equal["dispatcher over Ray"]) / most
        for cpu in ("coordinator_cpu_s", "hosts_cpu_s")
    )
    return text("scale").format(
        ray=facts["ray"],
        machine=MACHINE,
        rollout_s=facts["rollout_s"],
        rows=table((*heads, "hosts' CPU, s", "pairs rerun"), lines),
        most=most,
        turns=len(equal["Ray alone"]),
        own=alone,
        bare=bare,
        both=both,
        share=both - bare,
        coordinator=coordinator,
        hosts=hosts,
        one=times[1],
        two=times[2],
        efficiency=times[1] / times[2],
        **facts["bytes"],
        **_short(facts["short"]),
    )


def _short(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of short chunks, called for one by one and several at a time: medians of CPU seconds and of the step's."""
    words: dict[str, Any] = {"short_s": rows[0]["chunk_s"], "short_actors": rows[0]["actors"]}
    for name, together in (("single", False), ("several", True)):
        some = [row for row in rows if row["together"] == together]
        for part, key in (("cpu", "coordinator_cpu_s"), ("hosts", "hosts_cpu_s"), ("s", "seconds")):
            words[f"{name}_{part}"] = statistics.median(row[key] for row in some)
    return words | {"short_chunks": round(rows[0]["ideal"] * rows[0]["actors"] / rows[0]["chunk_s"])}


def _beyond(row: dict[str, Any]) -> float:
    """The share of the ideal step that the step took longer."""
    return float(row["seconds"] / row["ideal"] - 1)


def kills() -> str:
    rows = read_rows(chaos.FILE)
    if not rows:
        return "Not measured yet: `python -m bench.runs.chaos`."
    return f"`python -m bench.runs.chaos` ({MACHINE}):\n\n{chaos.chaos_table(rows)}"


def sharded() -> str:
    """A worker's peak memory with a base that is cut among workers."""
    facts = read_json("shard.json")
    if facts is None:
        return "Not measured yet: `python -m bench.speed.shard`."
    lines = []
    for again in (False, True):
        for workers in (1, 2):
            some = [row for row in facts["rows"] if (row["again"], row["workers"]) == (again, workers)]
            most = max(some, key=lambda row: row["peak_bytes"])
            sizes = [f"{most[key] / 1e9:.2f}" for key in ("held_bytes", "peak_bytes")]
            lines.append([str(workers), "yes" if again else "no", *sizes, f"{most['seconds']:.0f}"])
    heads = ("workers", "blocks computed again", "weights a worker, GB", "peak a worker, GB", "seconds")
    return text("shard").format(layers=facts["layers"], machine=MACHINE, rows=table(heads, lines))


def true_memory() -> str:
    """What a step of a denoiser of today's sizes takes: counted, expected by the package, and as it was run."""
    rows = read_json("true_memory.json")
    if rows is None:
        return ""
    parts = ("weights_gib", "pair", "1 steps", "1 step, by blocks", "3 steps, by steps", "3 steps")
    lines = []
    for row in sorted(rows, key=lambda row: (row["dtype"], row["side"])):
        cells = [str(row[name]) for name in ("model", "side", "dtype")] + [f"{row[part]:.2f}" for part in parts]
        lines.append([*cells, f"{row['1 steps'] + 2 * row['kept']:.2f}"])
    heads = ("denoiser", "latent's side", "dtype", "weights", "a pair, no gradient", "1 step with its gradient")
    heads_too = ("1 step, by blocks", "3 steps, checkpointed by steps", "3 steps", "3 steps, as expected")
    return text("true_memory").format(rows=table((*heads, *heads_too), lines), measured=_as_run(rows))


def _as_run(rows: list[dict[str, Any]]) -> str:
    """What was run of it, beside what was counted."""
    lines = []
    for row in rows:
        case = {name: row[name] for name in ("model", "side", "dtype")}
        run = {part: ("this CPU", gib, None) for part, gib in row.get("measured", {}).items()}
        facts = read_json(f"speed/steps_{row['model']}_cuda.json") or {}
        if (facts.get("side"), facts.get("dtype")) == (row["side"], row["dtype"]):
            some = {part: one for part, one in facts["rows"].items() if "peak_gib" in one}
            run = {part: (facts["machine"], one["peak_gib"], one["seconds"]) for part, one in some.items()}
        for part, (place, gib, seconds) in run.items():
            cells = [f"{row[part]:.2f}", f"{gib:.2f}", f"{gib / row[part]:.3f}", f"{seconds:.3f}" if seconds else ""]
            lines.append([*map(str, case.values()), part, place, *cells])
    heads = ("denoiser", "latent's side", "dtype", "work", "on", "counted, GiB", "measured, GiB", "ratio", "seconds")
    return (
        table(heads, lines) if lines else "Nothing of it has been run yet: `--check`, or `bench.speed.steps` on a GPU."
    )


def update_memory() -> str:
    results = read_json("speed/update_memory_cpu.json")
    if results is None:
        return ""
    heads = ("terms", "chunks", "extra, GB", "the same in P numbers", "resident, GB", "before, GB")
    rows = []
    for row in results:
        extra, *others = (f"{row[key] / 1e9:.3f}" for key in ("bytes", "resident_bytes", "bytes_before"))
        rows.append([row["plan"], str(row["chunks"]), extra, f"{row['numbers']:.2f}", *others])
    return text("memory").format(parameters=results[0]["parameters"], rows=table(heads, rows))
