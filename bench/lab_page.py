"""The laboratory's and the planner's tables."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from page import IMAGES, MACHINE, RESULTS, read_json, table  # beside this file

LAB = """## Every plan's bias, variance and cost on the embedded model

`rlr-ray lab --config configs/digits.yaml --set cluster=none --batches {batches} --cost {cost:g}
--out bench/results/lab`: {numbers} trained numbers, theta at the start of a run, batches of 40 chains in chunks of 20;
the reference is {kind} of {batches} batches,
|g| = {norm:.3f}. Variance per chain; cost in denoiser forwards a chain, a backward counted as two; plans marked * are
biased.
Machine: {machine}.

{rows}

![Variance at equal cost against memory](images/lab.png)

Step by step (variances per chain; the last column is the law of isotropic directions, P E|G|² - |g|²):

{profile}
"""


def lab() -> str:
    found = read_json("lab/lab.json")
    if found is None:
        return ""
    shutil.copy(RESULTS / "lab" / "lab.png", IMAGES / "lab.png")
    heads = ("plan", "bias along g", "variance", "cost", "variance x cost", "cosine", "peak MiB", "batches")
    rows = [_lab_row(row) for row in found["plans"]]
    profile = found["profile"]
    cells = [[f"{value:.3g}" if value is not None else "" for value in row.values()] for row in profile]
    return LAB.format(
        batches=found["reference"]["batches"],
        cost=found["cost"],
        numbers=found["trained_numbers"],
        kind=found["reference"]["kind"],
        norm=found["gradient_norm"],
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


PLANNER = """## The planner's choice for three budgets

`python bench/planner.py`: what `rlr-ray plan` does, with more time for the variances ({batches} batches). The choice is
the unbiased plan of least variance x cost that fits. Machine: {machine}.

{rows}

{best} and its rivals without a budget that binds ({budget:g} GiB):

{options}

Predicted against measured peaks of one batch's estimate, in MiB:

{memory}
"""


def planner() -> str:
    found = read_json("planner.json")
    if found is None:
        return ""
    heads = ("budget, GiB", "choice", "variance x cost", "predicted GiB", "measured GiB", "error", "the paper's h*")
    rows = [_choice_row(choice) for choice in found["choices"]]
    last = found["choices"][-1]
    shown = [option for option in last["options"] if option["unbiased"]][:12]
    return PLANNER.format(
        batches=last["batches"],
        machine=MACHINE,
        rows=table(heads, rows),
        best=last["best"]["name"],
        budget=last["budget_gib"],
        options=table(("plan", "variance", "cost", "variance x cost", "peak GiB"), [_option_row(o) for o in shown]),
        memory=_memory_table(found["memory"]),
    )


def _choice_row(choice: dict[str, Any]) -> list[str]:
    best = choice["best"]
    saving = ", checkpointed" if best["keys"]["checkpoint_steps"] else ", plain"
    numbers = [f"{best['variance'] * best['cost']:.3g}", f"{best['peak_gib']:.4f}", f"{choice['measured_gib']:.4f}"]
    return [
        f"{choice['budget_gib']:g}",
        best["name"] + saving,
        *numbers,
        f"{choice['error']:+.1%}",
        str(choice["rule"]["length"]),
    ]


def _option_row(option: dict[str, Any]) -> list[str]:
    saving = " (checkpointed)" if option["keys"]["checkpoint_steps"] else ""
    product = option["variance"] * option["cost"]
    cells = [f"{option['variance']:.3g} ± {option['variance_se']:.2g}", f"{option['cost']:.1f}", f"{product:.3g}"]
    return [option["name"] + saving, *cells, f"{option['peak_gib']:.4f}"]


def _memory_table(rows: Sequence[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(row["part"] for row in rows))
    cells: dict[int, list[str]] = {}
    for row in rows:
        predicted, measured = row["predicted"] / 2**20, row["measured"] / 2**20
        cells.setdefault(row["steps"], []).append(f"{predicted:.2f} / {measured:.2f} ({predicted / measured - 1:+.1%})")
    return table(["steps", *kinds], [[str(steps), *row] for steps, row in cells.items()])
