"""The table of half against zeroth order on still and on moving digits."""

from __future__ import annotations

import math
from typing import Any

from page import MACHINE, RESULTS, table  # beside this file
from whole_runs import read

BREAK_EVEN = """## Half against zeroth order: still and moving digits

`python bench/break_even.py`: first order on the last step, the rest to half order (REINFORCE, leave-one-out within a
prompt) or to zeroth order (isotropic directions, one a chain), on the embedded models at the start of a run. V_BP:
variance of a chain's exact gradient through the same steps; V_HO, V_ZO: of the two estimates, per chain and per pair.
The law's V_ZO is P (|g|² + V_BP) - |g|², its break-even size P* = (r V_HO + |g|²) / (|g|² + V_BP), r = 3 (T - 1) / 2T,
what a chain of half order costs in pairs: below P* zeroth order is less noisy at equal cost. The last column is
measured: V_ZO / (r V_HO), below 1 if zeroth order is. g² is |g|², unbiased, 0 if the estimate is below. Latents have
{sizes}. ± are standard errors; where they are large the tails are heavy, and V_ZO is as uncertain as V_BP.
Machine: {machine}.

{rows}
"""


def break_even() -> str:
    rows = read(RESULTS / "break_even.jsonl")
    if not rows:
        return ""
    sizes = {row["recipe"]: math.prod(row["latent_shape"]) for row in rows}
    heads = ("model", "adapter", "P", "g²", "V_BP", "V_HO", "V_ZO", "law's V_ZO", "P*", "V_ZO / (r V_HO)")
    return BREAK_EVEN.format(
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
