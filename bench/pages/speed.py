"""The page's part on speed: what bench/speed/gpu.sh left in bench/results/speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from bench.common import read_json, table, text
from bench.speed.measuring import median_ratio
from bench.speed.overlap import longer_halves
from bench.speed.throughput import CHAIN, DIRECTIONS, PIPELINE, ROLLOUT
from bench.speed.update_parts import HALF, UPDATE
from bench.speed.update_parts import ROLLOUT as PAIR

Facts = Mapping[str, Any]
NAMES = {
    "sd14": "Stable Diffusion 1.4's true size",
    "sdxl": "Stable Diffusion XL's true size",
    "tiny_sd": "a tiny Stable Diffusion",
    "tiny_sdxl": "a tiny Stable Diffusion XL",
    "digits": "the embedded digits model",
}
SMALL = {"sd14": "tiny_sd", "sdxl": "tiny_sdxl"}
BENCHES: dict[str, tuple[str, ...]] = {
    size: ("update_parts", "throughput", "rollouts", "overlap") for size in SMALL
}  # of bench/speed/gpu.sh on a GPU
BENCHES |= {"digits": ("throughput", "overlap", "speedups", "demo")}
GB = 2**30 / 1e9  # in a GiB


def speed() -> str:
    """All of it."""
    lacking = {size: [bench for bench in names if not _kept(bench, size, "cuda")] for size, names in BENCHES.items()}
    words = [f"{', '.join(benches)} of {NAMES[size]}" for size, benches in lacking.items() if benches]
    missing = f"Not measured yet on a GPU: {'; '.join(words)}." if words else ""
    sections = [
        text("speed").format(missing=missing),
        *(_parts(size) for size in SMALL),
        _throughput(),
        _rollouts(),
        _overlap(),
    ]
    return "\n".join(filter(None, [*sections, _tried(), _demo_pair(), _demo()]))


def _kept(bench: str, size: str, device: str) -> Facts | None:
    facts: Facts | None = read_json(f"speed/{bench}_{size}_{device}.json")
    return facts


def _all(bench: str) -> Iterator[Facts]:
    """What there is of a bench, GPUs first."""
    for device in ("cuda", "cpu"):
        for size in NAMES:
            if facts := _kept(bench, size, device):
                yield facts


def _told(facts: Facts) -> str:
    """Which model, where and when."""
    load = "" if facts["device"] == "cuda" else f", load {facts['load']:.1f}"
    return (
        f"{NAMES[facts['size']]} ({facts['denoiser_parameters']:,} numbers, {facts['trained_numbers']:,} trained, "
        f"T = {facts['steps']}) on {facts['machine']}{load} (torch {facts['torch']}, {facts['date']})"
    )


def _shares(facts: Facts, tflop: float, seconds: float) -> str:
    """FLOP/s, and their share of what a matrix product reaches there and of the maker's figure."""
    rate = tflop / seconds
    told = f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1000 * rate:.3g} GFLOP/s"
    shares = [f"{rate / facts['product_tflops']:.0%} of a matrix product's"]
    shares += [f"{rate / facts['peak_tflops']:.0%} of the peak"] if facts["peak_tflops"] else []
    return f"{told} ({', '.join(shares)})"


def _parts(size: str) -> str:
    """At true size on a GPU; where that is not there, at reduced size on a CPU."""
    facts = _kept("update_parts", size, "cuda")
    true = facts is not None
    facts = facts or _kept("update_parts", SMALL[size], "cpu")
    if facts is None:
        return ""
    unit, scale = ("GiB", 1) if true else ("MiB", 1024)
    rows = []
    for name, row in facts["rows"].items():
        if row.get("out_of_memory"):
            rows.append([name, "does not fit", "", ""])
            continue
        shares = _shares(facts, row["tflop"], row["seconds"])
        rows.append([name, f"{row['seconds']:.3f}", f"{scale * row['peak_gib']:.2f}", shares])
    caution = f"\nIn place of {NAMES[size]}: that the script runs; it says nothing of that size's seconds and memory."
    return text("parts").format(
        name=NAMES[facts["size"]],
        facts=_told(facts),
        caution="" if true else caution,
        rows=table(("work", "seconds", f"peak {unit}", "arithmetic"), rows),
        memory=_memory(facts, true),
        batch=facts["batch"],
        held=f"{scale * facts['weights_gib']:.1f} {unit}",
    )


def _memory(facts: Facts, true: bool) -> str:
    """B_h, B_z and the paper's budget."""
    rows = {name: row for name, row in facts["rows"].items() if "peak_gib" in row}
    halves = [(h, rows[HALF.format(h)]["peak_gib"]) for h in (1, 2, 3, 4) if HALF.format(h) in rows]
    if len(halves) < 2 or PAIR not in rows:
        return ""
    b_h = statistics.linear_regression(*zip(*halves, strict=True)).slope
    rollout = rows[PAIR]["peak_gib"]
    paper = " (the paper's: 8 and 0.24 GB)" if facts["size"] == "sd14" else ""
    unit, scale = ("GB", GB) if true else ("MiB", 1024)
    words = (
        f"Memory for each step of the sub-chain, B_h (the slope over h): {scale * b_h:.2f} {unit}; for each zeroth-"
        f"order step, B_z (a rollout's peak over T): {scale * rollout / facts['steps']:.3g} {unit}{paper}; a whole "
        f"rollout {scale * rollout:.2f} {unit}."
    )
    updates = [UPDATE.format(1, 2), f"update: K = {facts['steps']}, checkpointed"]
    peaks = {name: rows[name]["peak_gib"] + facts["weights_gib"] for name in updates if name in rows}
    totals = [f"{name}: {scale * peak:.1f} {unit}" for name, peak in peaks.items()]
    budget = " (the paper: 30 GB for the first)" if facts["size"] == "sd14" else ""
    return words + (f" With the model's weights: {'; '.join(totals)}{budget}." if totals else "")


def _throughput() -> str:
    rows, told = [], []
    for facts in _all("throughput"):
        told.append(_told(facts))
        for kind in ("chain alone", "whole"):
            for count in DIRECTIONS:
                row = facts["rows"].get(f"{kind}, {count}")
                if row is not None:
                    rows.append([f"{facts['size']}, {_place(facts)}", kind, str(count), *_rates(facts, row, 2 * count)])
    if not rows:
        return ""
    heads = ("size", "of", "directions", "rollout, chains/s", "over this package's inference")
    return text("throughput").format(
        rows=table((*heads, "over diffusers' pipeline", "arithmetic"), rows), machines="; ".join(told) + "."
    )


def _rates(facts: Facts, row: dict[str, Any], chains: int) -> list[str]:
    if row.get("out_of_memory"):
        return ["does not fit", "", "", ""]
    seconds: dict[str, list[float]] = row["seconds"]
    ratios = [f"{median_ratio(seconds[plain], seconds[ROLLOUT]):.2f}" for plain in (CHAIN, PIPELINE)]
    rate = chains / statistics.median(seconds[ROLLOUT])
    return [f"{rate:.3g}", *ratios, _shares(facts, row["tflop"], statistics.median(seconds[CHAIN]))]


def _place(facts: Facts) -> str:
    return "GPU" if facts["device"] == "cuda" else "CPU"


def _rollouts() -> str:
    """As actors may have them: in another dtype, or compiled."""
    rows = []
    for facts in _all("rollouts"):
        for name, row in facts["rows"].items():
            if not row.get("out_of_memory"):
                cells = [f"{row['ratio']:.2f}", f"{row['first_call']:.2g}"]
                rows.append([f"{facts['size']}, {_place(facts)} ({facts['date']})", name, *cells])
    heads = ("size", "actors' way", "times as fast as the workers'", "first call, s")
    return text("rollouts").format(rows=table(heads, rows)) if rows else ""


def _overlap() -> str:
    rows, told = [], []
    for facts in _all("overlap"):
        turns = facts["rows"].get("turns", {})
        if "step" not in turns:
            continue
        told.append(_told(facts))
        longer = longer_halves(turns)
        sums = [sum(pair) for pair in zip(turns["half"], turns["rollouts"], strict=True)]
        columns = ("half", "rollouts", "half_beside", "rollouts_beside", "step")
        cells = [f"{statistics.median(turns[name]):.2f}" for name in columns]
        cells += [f"{median_ratio(turns['step'], under):.2f}" for under in (longer["alone"], longer["beside"], sums)]
        rows.append([f"{facts['size']}: {facts['where']}", *cells])
    if not rows:
        return ""
    heads = ["size", "first and half order, s", "rollouts, s", "the first beside, s", "the second beside, s"]
    heads += ["update, s", "over the longer alone", "over the longer beside", "over the sum alone"]
    return text("overlap").format(rows=table(heads, rows), machines="; ".join(told) + ".")


def _demo() -> str:
    heads = ("machine", "start to finish, s", "updates, s", "gain")
    rows = []
    for facts in _all("demo"):
        row = facts["rows"]["demo"]
        cells = [f"{row['start_to_finish']:.0f}", f"{row['seconds']:.0f}", f"{row['gain']:.2f} ± {row['gain_se']:.2f}"]
        rows.append([f"{facts['machine']} ({facts['date']})", *cells])
    return text("demo").format(rows=table(heads, rows)) if rows else ""


def _demo_pair() -> str:
    facts = read_json("demo_pair.json")
    if facts is None:
        return ""
    heads = ("turn", "revision", "start to finish, s", "updates, s", "gain", "load at the end")
    rows = []
    for number, turn in enumerate(facts["turns"], 1):
        for name, run in turn.items():
            cells = [
                f"{run['start_to_finish']:.0f}",
                f"{run['seconds']:.0f}",
                f"{run['gain']:.2f} ± {run['gain_se']:.2f}",
            ]
            rows.append([str(number), name, *cells, f"{run['load']:.1f}"])
    ratio = statistics.median(
        turn["now"]["start_to_finish"] / turn["before"]["start_to_finish"] for turn in facts["turns"]
    )
    told = {name: facts[name] for name in ("machine", "date")} | facts["revisions"]
    return text("pair_demo").format(ratio=ratio, rows=table(heads, rows), **told)


def _tried() -> str:
    heads = ("what", "size", "times as fast", "quartiles", "first call, s")
    rows, told = [], []
    for facts in _all("speedups"):
        told.append(_told(facts))
        for name, row in facts["rows"].items():
            taken = row["seconds"]
            ratios = [one / other for one, other in zip(taken["without"], taken["with"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            cells = [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['first_call']:.2g}"]
            rows.append([name, facts["size"], *cells])
    return text("tried").format(rows=table(heads, rows), machines="; ".join(told) + ".") if rows else ""
