"""The paper's ablation on the embedded model: one job under many plans, at equal denoiser cost.

    python bench/ablation.py --jobs 2            # resumable: a finished run is not run again
    python bench/ablation.py --jobs 2 --rank4    # the same with an adapter of rank 4

Every plan first gets each learning rate once, on a seed of its own; the best one then runs on the seeds of the table.
Cost is counted in denoiser forwards, a backward as two: a plan that is cheaper per update gets more updates. Results
are appended to bench/results/ablation*.jsonl; `python bench/tables.py` turns them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet

from rlr_ray.recipes import load_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
UPDATES = 40  # of the demo; all others get as many as cost the same
POINTS = 8  # held-out evaluations along a run
SWEEP_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
BASE = ["cluster=none", "evaluation.chains=200"]
RANK_4 = ["adapter={type: LORA, r: 4, lora_alpha: 4, target_modules: [attn2.to_out.0]}"]
LEARNING_RATES = (0.01, 0.03, 0.1)
NO_SUB_CHAIN, NO_REST = "estimator.sub_chain.length=0", "estimator.rest=none"
ISOTROPIC = "zeroth_order: {count: 80, chunk_size: 20}"
# Plan -> overrides of configs/digits.yaml
VARIANTS: dict[str, list[str]] = {
    "FO + HO + ZO (rlr)": [],
    "FO + HO": [NO_REST],
    "FO + ZO": [NO_SUB_CHAIN],
    "FO, K = 3 (AlignProp)": [NO_SUB_CHAIN, NO_REST],
    "FO, K = 1 (AlignProp)": ["estimator.first_order_steps=1", NO_SUB_CHAIN, NO_REST],
    "FO + REINFORCE": [NO_SUB_CHAIN, "estimator.rest=half_order"],
    "full backprop": ["estimator={preset: full_bp}"],
    "DDPO (REINFORCE)": ["estimator={preset: ddpo}"],
    "ES": [f"estimator={{preset: es, {ISOTROPIC}}}"],
    "planner's choice, FO(4) + REINFORCE": [
        "estimator={first_order_steps: 4, sub_chain: {length: 0}, rest: half_order, half_order: {weight: 1.0}}"
    ],
    "rlr-paper": [f"estimator={{preset: rlr-paper, {ISOTROPIC}}}"],
}


def cost_per_update(overrides: list[str]) -> int:
    config = load_config(str(ROOT / "configs" / "digits.yaml"), overrides)
    forwards, backwards = config.cost([config.plan_shape.draw(0, 0)])
    return forwards + 2 * backwards


def run(variant: str, rate: float, seed: int, base: list[str]) -> dict[str, Any]:
    """One run in a process of its own; its row."""
    overrides = [*base, *VARIANTS[variant]]
    updates = round(UPDATES * cost_per_update(base) / cost_per_update(overrides))
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"seed={seed}", f"train.iterations={updates}", f"train.learning_rate={rate}", f"output_dir={folder}"]
        keys += [f"evaluation.every={max(updates // POINTS, 1)}", *overrides]
        command = [sys.executable, "-m", "rlr_ray", "train", "--config", "configs/digits.yaml"]
        command += [word for key in keys for word in ("--set", key)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "digits" / "summary.json").read_text())
        rows = pyarrow.parquet.read_table(Path(folder) / "digits" / "metrics.parquet").to_pylist()
    held_out = {row["step"] + 1: row["held_out_reward"] for row in rows if row.get("held_out_reward") is not None}
    curve = {0: summary["reward_before"], **held_out, updates: summary["reward_after"]}
    kept = ("steps", "denoiser_forwards", "denoiser_backwards", "reward_before", "reward_after", "gain", "gain_se")
    kept += ("seconds", "versions")
    row = {"variant": variant, "learning_rate": rate, "seed": seed, "curve": curve}
    row |= {f"judge_{when}": summary["scores"]["digits_judge"][when] for when in ("before", "after")}
    return row | {name: summary[name] for name in kept}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def best_rate(rows: Iterable[dict[str, Any]], variant: str) -> float:
    """The learning rate of the highest gain in the sweep."""
    swept = [row for row in rows if row["variant"] == variant and row["seed"] == SWEEP_SEED]
    return max(swept, key=lambda row: row["gain"])["learning_rate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--rank4", action="store_true", help="an adapter of rank 4")
    parser.add_argument("--plans", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these alone")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds of the table")
    options = parser.parse_args()
    base, results = ([*BASE, *RANK_4], "ablation_rank4.jsonl") if options.rank4 else (BASE, "ablation.jsonl")
    file = RESULTS / results

    def keep(job: tuple[str, float, int]) -> None:
        row = run(*job, base)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{job}: gain {row['gain']:.3f}, judge {row['judge_after']:.3f}, {row['seconds']:.0f} s", flush=True)

    def run_all(jobs: list[tuple[str, float, int]]) -> None:
        seen = {(row["variant"], row["learning_rate"], row["seed"]) for row in read(file)}
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(keep, [job for job in jobs if job not in seen]))

    run_all([(name, rate, SWEEP_SEED) for name in options.plans for rate in LEARNING_RATES])
    rows = read(file)
    run_all([(name, best_rate(rows, name), seed) for seed in SEEDS[: options.seeds] for name in options.plans])


if __name__ == "__main__":
    main()
