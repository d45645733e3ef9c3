"""The laboratory's and the planner's tables."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

from bench.common import IMAGES, MACHINE, RESULTS, read_json, read_rows, table, text


def lab() -> str:
    results = read_json("lab/lab.json")
    if results is None:
        return ""
    shutil.copy(RESULTS / "lab" / "lab.png", IMAGES / "lab.png")
    heads = ("plan", "bias along g", "variance", "cost", "variance x cost", "cosine", "peak MiB", "batches")
    rows = [_lab_row(row) for row in results["plans"]]
    profile = results["profile"]
    cells = [[f"{value:.3g}" if value is not None else "" for value in row.values()] for row in profile]
    return text("lab").format(
        batches=results["reference"]["batches"],
        cost=results["cost"],
        numbers=results["trained_numbers"],
        kind=results["reference"]["kind"],
        norm=results["gradient_norm"],
        machine=MACHINE,
        rows=table(heads, rows),
        profile=table([name.replace("_", " ") for name in profile[0]], cells),
    )


def _lab_row(row: dict[str, Any]) -> list[str]:
    return [
        row["name"] + ("" if row["unbiased"] else " *"),
        f"{row['relative_bias']:+.2f} ± {row['relative_bias_se']:.2f}",
        f"{row['variance']:.3g} ± {row['variance_se']:.2g}",
        f"{row['cost']:.1f}",
        f"{row['variance_cost']:.3g}",
        f"{row['cosine']:.2f}",
        f"{row['peak_mib']:.1f}",
        str(row["batches"]),
    ]


def planner() -> str:
    results = read_json("planner.json")
    if results is None:
        return ""
    heads = ("budget, GiB", "choice", "price", "predicted GiB", "measured GiB", "error", "the paper's h*")
    rows = [_choice_row(choice) for choice in results["choices"]]
    last = results["choices"][-1]
    biased = [option for option in last["options"] if option["agreement"]]
    shown = [option for option in last["options"] if option["unbiased"]][:10] + biased
    columns = ("plan", "noise scale", "cost", "cosine", "beside clipped", "price", "peak GiB")
    return text("planner").format(
        batches=last["batches"],
        machine=MACHINE,
        rows=table(heads, rows),
        best=last["best"]["name"],
        budget=last["budget_gib"],
        reference=last["reference"],
        seconds=last["seconds"],
        options=table(columns, [_option_row(option) for option in shown]),
        memory=_memory_table(results["memory"]),
    )


def _choice_row(choice: dict[str, Any]) -> list[str]:
    best = choice["best"]
    saving = ", checkpointed" if best["keys"]["checkpoint_steps"] else ", plain"
    numbers = [f"{best['price']:.3g}", f"{best['peak_gib']:.4f}", f"{choice['measured_gib']:.4f}"]
    return [
        f"{choice['budget_gib']:g}",
        best["name"] + saving,
        *numbers,
        f"{choice['error']:+.1%}",
        str(choice["rule"]["length"]),
    ]


def _option_row(option: dict[str, Any]) -> list[str]:
    saving = " (checkpointed)" if option["keys"]["checkpoint_steps"] else ""
    error = option["variance_se"] / option["signal"]
    cells = [f"{option['noise_scale']:.3g} ± {error:.1g}", f"{option['cost']:.1f}"]
    cells += ["1" if option["unbiased"] else _cosine(option["agreement"]), _cosine(option["beside_clipped"])]
    cells += [f"{option['price']:.3g}" if math.isfinite(option["price"]) else "", f"{option['peak_gib']:.4f}"]
    return [option["name"] + saving + ("" if option["unbiased"] else " *"), *cells]


def _cosine(told: dict[str, float] | None) -> str:
    if told is None:
        return ""
    return f"{told['cosine']:.2f} ± {told['cosine_se']:.2f}" if math.isfinite(told["cosine_se"]) else "too noisy"


def _memory_table(rows: Sequence[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(row["part"] for row in rows))
    cells: dict[int, list[str]] = {}
    for row in rows:
        predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
        cells.setdefault(row["steps"], []).append(f"{predicted:.2f} / {measured:.2f} ({predicted / measured - 1:+.1%})")
    return table(["steps", *kinds], [[str(steps), *row] for steps, row in cells.items()])


def break_even() -> str:
    rows = read_rows(RESULTS / "break_even.jsonl")
    if not rows:
        return ""
    sizes = {row["recipe"]: math.prod(row["latent_shape"]) for row in rows}
    heads = ("model", "adapter", "P", "g²", "V_BP", "V_HO", "V_ZO", "law's V_ZO", "P*", "V_ZO / (r V_HO)")
    return text("break_even").format(
        sizes=", ".join(f"{size} numbers ({name})" for name, size in sizes.items()),
        machine=MACHINE,
        rows=table(heads, [_row(row) for row in rows]),
    )


def _row(row: dict[str, Any]) -> list[str]:
    numbers, square, spread = row["trained_numbers"], max(row["squared_norm"], 0.0), row["pathwise_variance"]
    half, zeroth = (row["plans"][name]["term"] for name in ("half_order", "zeroth_order"))
    rate = 3 * (row["steps"] - 1) / (2 * row["steps"])
    return [
        row["recipe"].replace("_", " "),
        row["adapter"],
        str(numbers),
        f"{square:.3g}",
        f"{spread:.3g} ± {row['pathwise_variance_se']:.2g}",
        f"{half:.3g} ± {row['plans']['half_order']['variance_se']:.2g}",
        f"{zeroth:.3g}",
        f"{numbers * (square + spread) - square:.3g}",
        f"{(rate * half + square) / (square + spread):.3g}",
        f"{zeroth / (rate * half):.3g}",
    ]


SPANS = ("isotropic", "the four guides", *(f"{count} components of half order" for count in (4, 8, 16, 32)))
PAIRS, AVERAGING = 80, 8


def workers(rate: str = "0.1") -> str:
    """What each span and number of directions buy, from bench.runs.directions."""
    results = read_json("directions.json")
    if results is None:
        return ""
    measured = results[rate]["measured"]
    counts = (1, 4, 16, 64)
    return text("workers").format(
        rate=rate,
        updates=", ".join(measured),
        chains=1280,
        pairs=PAIRS,
        averaging=AVERAGING,
        heads=" | ".join(f"{n} worker{'s' * (n > 1)}: error; cosine; with half order" for n in counts),
        rules="---|" * len(counts),
        rows="\n".join(_span_row(name, list(measured.values()), [PAIRS * n for n in counts]) for name in SPANS),
    )


def _span_row(name: str, updates: list[dict[str, Any]], counts: list[int]) -> str:
    captured = sum(row["spans"][name]["signal"] for row in updates) / sum(row["part"] for row in updates)
    cells = [name, f"{captured:.2f}"]
    for count in counts:
        error = statistics.mean(zeroth_error(row, row["spans"][name], count) for row in updates)
        run = [rolled_error(row, name, count) for row in updates if f"error_{count}" in row["rollouts"].get(name, {})]
        cosines = [statistics.mean(total_cosine(row, name, count, half) for row in updates) for half in (False, True)]
        shown = f"{error:.2f}" + (f" ({statistics.mean(run):.2f})" if run else "")
        cells.append("; ".join([shown, *(f"{cosine:.2f}" for cosine in cosines)]))
    return f"| {' | '.join(cells)} |"


def _variance(span: dict[str, float], count: int) -> float:
    """Of a mean of `count` directions, by the law in core/zeroth_order.py."""
    return (span["dimensions"] * span["second_moment"] - max(span["signal"], 0.0)) / count


def zeroth_error(row: dict[str, Any], span: dict[str, float], count: int) -> float:
    """E |w z - g_C|^2 / |g_C|^2 with the best w."""
    signal = max(span["signal"], 0.0)
    return 1 - signal**2 / (signal + _variance(span, count)) / row["part"]


def rolled_error(row: dict[str, Any], name: str, count: int) -> float:
    """The same with the squared distance from the projected g_C that rollouts had, at the law's w."""
    span = row["spans"][name]
    signal = max(span["signal"], 0.0)
    w = signal / (signal + _variance(span, count))
    return 1 + (w**2 * row["rollouts"][name][f"error_{count}"] + (w**2 - 2 * w) * signal) / row["part"]


def total_cosine(row: dict[str, Any], name: str, count: int, half: bool, averaging: int = AVERAGING) -> float:
    """Of first order + w z (+ w' half order), each with the weight of least squared error, with the whole gradient."""
    span = row["spans"][name]
    signal, variance = max(span["signal"], 0.0), _variance(span, count) / averaging
    w = signal / (signal + variance)
    along = row["first_with_all"] + w * span["with_all"]
    square = row["first"] + row["first_variance"] / 80 / averaging + w**2 * (signal + variance)
    square += 2 * w * span["with_first"]
    if half:
        signal, variance = max(row["half"], 0.0), row["half_variance"] / 80 / averaging
        v = signal / (signal + variance)
        along += v * row["half_with_all"]
        square += v**2 * (signal + variance) + 2 * v * row["half_with_first"] + 2 * v * w * span["with_half"]
    return along / math.sqrt(square * row["all"])
