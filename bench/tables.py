"""Write docs/benchmarks.md from bench/results: `python bench/tables.py`. Figures cannot drift from data."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ablation import VARIANTS  # beside this file

BENCH = Path(__file__).resolve().parent
PAGE = BENCH.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python bench/tables.py` from the files in `bench/results`; do not edit.
"""

ABLATION = """## What each term of the demo contributes

`python bench/ablation.py`: `configs/digits.yaml` in one process (`cluster: none`, the same numbers as on Ray) under
other plans, each with the same cost in denoiser forwards (a backward counts two). Gain: held-out reward after minus
before, 400 paired chains; a single run's standard error is about {error:.2f}, and the spread over seeds is larger, so
rows that differ by less than that spread are ties. Judge: share of pictures that a classifier which is never trained
on reads as the digit asked for; {judge:.2f} before. Machine: two x86-64 cores, one thread a run.

{tables}"""

TABLE = """{title}

| plan | updates | gain at half the cost, by seed | gain, mean | gain by seed | judge after, mean | judge by seed |
|---|---|---|---|---|---|---|
{rows}
"""

TITLES = {
    "ablation.jsonl": "The demo's adapter (LoRA rank 1, learning rate .1), seeds {seeds}:",
    "ablation_rank4.jsonl": "LoRA rank 4, learning rate .05 (`python bench/ablation.py --rank4`), seeds {seeds}:",
}

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
    files = {name: BENCH / "results" / name for name in TITLES}
    runs = {name: _read(file) for name, file in files.items() if file.exists()}
    every = [row for rows in runs.values() for row in rows]
    return ABLATION.format(
        error=statistics.mean(row["gain_se"] for row in every),
        judge=statistics.mean(row["judge_before"] for row in every),
        tables="\n".join(_ablation_table(TITLES[name], rows) for name, rows in runs.items()),
    )


def _read(file: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["seed"])


def _ablation_table(title: str, rows: list[dict[str, Any]]) -> str:
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: list(VARIANTS).index(row["variant"])):
        by_variant.setdefault(row["variant"], []).append(row)
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    lines = "\n".join(_ablation_row(variant, runs) for variant, runs in by_variant.items())
    return TABLE.format(title=title.format(seeds=seeds), rows=lines)


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
