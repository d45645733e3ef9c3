"""A black-box reward with and without a surrogate: the embedded model's job under four plans, at equal denoiser cost.

    nice python bench/surrogate.py --jobs 1      # resumable: a finished run is not run again

`configs/digits.yaml` with `reward.differentiable: false`: no gradient of the reward is used. As in bench/ablation.py,
every plan first gets each learning rate once, on a seed of its own; the best one then runs on the seeds of the table;
cost is counted in denoiser forwards, a backward as two. Results are appended to bench/results/surrogate.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet
from ablation import POINTS, SWEEP_SEED, UPDATES, best_rate, cost_per_update, read  # beside this file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "surrogate.jsonl"
BUDGET = UPDATES * cost_per_update(["cluster=none"])  # that of the demo
SEEDS, LEARNING_RATES = (0, 1, 2), (0.03, 0.1)
BASE = ["cluster=none", "evaluation.chains=200", "reward.differentiable=false"]
# Plan -> overrides of configs/digits.yaml
VARIANTS: dict[str, list[str]] = {
    "REINFORCE (ddpo)": ["estimator={preset: ddpo}"],
    "surrogate, rest weighed (auto)": ["estimator={preset: surrogate}"],
    "surrogate, rest at weight 1": ["estimator={preset: surrogate, half_order: {weight: 1}}"],
    "surrogate alone": ["estimator={preset: surrogate, rest: none}"],
}
KEPT = ("steps", "denoiser_forwards", "denoiser_backwards", "reward_before", "reward_after", "gain", "gain_se")
KEPT += ("surrogate", "seconds", "versions")


def run(variant: str, rate: float, seed: int) -> dict[str, Any]:
    """One run in a process of its own; its row."""
    overrides = [*BASE, *VARIANTS[variant]]
    updates = round(BUDGET / cost_per_update(overrides))
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
    row = {"variant": variant, "learning_rate": rate, "seed": seed, "curve": curve}
    row |= {f"judge_{when}": summary["scores"]["digits_judge"][when] for when in ("before", "after")}
    row["correlations"] = [row.get("surrogate_correlation") for row in rows]
    row["weights"] = [row.get("half_order_weight") for row in rows]
    return row | {name: summary[name] for name in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)

    def keep(job: tuple[str, float, int]) -> None:
        row = run(*job)
        with RESULTS.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{job}: gain {row['gain']:.3f}, judge {row['judge_after']:.3f}, {row['seconds']:.0f} s", flush=True)

    def run_all(jobs: list[tuple[str, float, int]]) -> None:
        seen = {(row["variant"], row["learning_rate"], row["seed"]) for row in read(RESULTS)}
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(keep, [job for job in jobs if job not in seen]))

    run_all([(name, rate, SWEEP_SEED) for name in VARIANTS for rate in LEARNING_RATES])
    rows = read(RESULTS)
    run_all([(name, best_rate(rows, name), seed) for seed in SEEDS for name in VARIANTS])


if __name__ == "__main__":
    main()
