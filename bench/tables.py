"""Write docs/benchmarks.md and its figures from bench/results: `python bench/tables.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ablation as ablation_runs  # beside this file, as the next ones
from ablation_page import ablation
from break_even_page import break_even
from directions_page import workers
from gpu_page import speed
from lab_page import lab, planner
from page import DOCS, IMAGES, MACHINE, RESULTS, mean_se, table
from peers_page import peers
from rewards_page import rewards
from scale_page import kills, scale
from tune_page import tune
from whole_runs import SWEEP_SEED, read

HEAD = """# Benchmarks

Written by `python bench/tables.py` from the files in `bench/results`; do not edit: figures cannot drift from data. What
it means, and which plan to use when: [estimators.md](estimators.md).
"""

SURROGATE = """## Black-box rewards: a surrogate learned online

`python bench/surrogate.py`: the demo's job with its reward taken as a black box, at the cost of {updates} updates of
the demo. Learning rates as in the ablation; seeds {seeds}. Correlation of the surrogate with the reward on fresh
chains: median over the last quarter. Machine: {machine}.

{rows}
"""


def surrogate() -> str:
    rows = read(RESULTS / "surrogate.jsonl")
    runs = [row for row in rows if row["seed"] != SWEEP_SEED]
    if not runs:
        return ""
    variants = list(dict.fromkeys(row["variant"] for row in runs))
    grouped = [[row for row in runs if row["variant"] == variant] for variant in variants]
    heads = ("plan", "learning rate", "updates", "seeds", "gain", "judge", "correlation")
    return SURROGATE.format(
        updates=ablation_runs.UPDATES,
        seeds=", ".join(map(str, sorted({row["seed"] for row in runs}))),
        machine=MACHINE,
        rows=table(heads, [_surrogate_row(part) for part in grouped]),
    )


def _surrogate_row(runs: Sequence[dict[str, Any]]) -> list[str]:
    late = [value for run in runs for value in run["correlations"][-run["steps"] // 4 :] if value is not None]
    cells = [runs[0]["variant"], f"{runs[0]['learning_rate']:g}", str(runs[0]["steps"]), str(len(runs))]
    cells += [mean_se([run["gain"] for run in runs]), mean_se([run["judge_after"] for run in runs])]
    return [*cells, f"{statistics.median(late):.2f}" if late else ""]


def fill(page: Path, name: str, block: str) -> None:
    """Put a block between `<!-- name -->` and `<!-- end -->`."""
    start, stop = f"<!-- {name} -->\n", "<!-- end -->"
    head, _, rest = page.read_text("utf-8").partition(start)
    page.write_text(head + start + block.strip() + "\n" + stop + rest.partition(stop)[2], "utf-8")


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    rank_1 = ("ablation.jsonl", "python bench/ablation.py", "LoRA of rank 1, 576 trained numbers", "ablation.png")
    rank_4 = ("ablation_rank4.jsonl", "python bench/ablation.py --rank4", "LoRA of rank 4", "ablation_rank4.png")
    sections = [
        HEAD,
        ablation(*rank_1),
        ablation(*rank_4),
        lab(),
        planner(),
        break_even(),
        tune(),
        surrogate(),
        peers(),
        rewards(),
        speed(),
    ]
    (DOCS / "benchmarks.md").write_text("\n".join(filter(None, sections)))
    fill(DOCS / "estimators.md", "workers", workers())
    fill(DOCS / "scaling.md", "scale", scale())
    fill(DOCS / "scaling.md", "kills", kills())
    print(DOCS / "benchmarks.md")


if __name__ == "__main__":
    main()
