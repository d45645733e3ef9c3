"""Write docs/benchmarks.md from bench/results: `python bench/tables.py`. Figures cannot drift from data."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
PAGE = BENCH.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python bench/tables.py` from the files in `bench/results`; do not edit.
"""

ABLATION = """## What each term of the demo contributes

`python bench/ablation.py`: `configs/digits.yaml` in one process (`cluster: none`, the same numbers as on Ray) under
other plans, each with the same cost in denoiser forwards (a backward counts two), seeds {seeds}. Gain: held-out reward
after minus before, {chains} paired chains, mean over seeds (a single run's standard error is about {error:.2f}).
Judge: share of pictures that a classifier which is never trained on reads as the digit asked for; {judge:.2f} before.
Machine: {machine}.

| plan | updates | gain at half the cost, by seed | gain, mean | gain by seed | judge after, mean | judge by seed |
|---|---|---|---|---|---|---|
{rows}
"""

STEP = """## Memory and seconds at Stable Diffusion 1.4's true size

`bash bench/gpu.sh` (random weights, T = {steps}, guidance 5, 512 x 512 pixels, {batch} chain at once, LoRA rank 4:
{trained_numbers:,} numbers; torch {torch}). Peak memory beyond the idle model. Machine: {machine}.

| part of an update | seconds | peak GiB |
|---|---|---|
{rows}
"""

NO_STEP = """## Memory and seconds at Stable Diffusion 1.4's true size

Not measured yet: `bash bench/gpu.sh` on a machine with a GPU fills this in.
"""


def ablation() -> str:
    file = BENCH / "results" / "ablation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        by_variant.setdefault(row["variant"], []).append(row)
    return ABLATION.format(
        seeds=", ".join(map(str, sorted({row["seed"] for row in rows}))),
        chains=400,
        error=statistics.mean(row["gain_se"] for row in rows),
        judge=statistics.mean(row["judge_before"] for row in rows),
        machine="two x86-64 cores, one thread a run",
        rows="\n".join(_ablation_row(variant, runs) for variant, runs in by_variant.items()),
    )


def _ablation_row(variant: str, runs: list[dict[str, Any]]) -> str:
    gains, judges = [run["gain"] for run in runs], [run["judge_after"] for run in runs]
    half = [run["held_out_by_quarter"][1] - run["reward_before"] for run in runs]
    cells = [variant, str(runs[0]["steps"]), _list(half), f"{statistics.mean(gains):.2f}", _list(gains)]
    cells += [f"{statistics.mean(judges):.2f}", _list(judges)]
    return f"| {' | '.join(cells)} |"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def step() -> str:
    file = BENCH / "results" / "sd_step.json"
    if not file.exists():
        return NO_STEP
    facts = json.loads(file.read_text())
    rows = [f"| {name} | {row['seconds']:.3f} | {row['peak_gib']:.2f} |" for name, row in facts.pop("rows").items()]
    return STEP.format(rows="\n".join(rows), **facts)


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([HEAD, ablation(), step()]))
    print(PAGE)


if __name__ == "__main__":
    main()
