"""What each term of the demo contributes: the same job under other plans, at equal cost, over several seeds.

    python bench/ablation.py --jobs 2     # resumable: a finished run is not run again
    python bench/ablation.py --rank4      # the same with an adapter of rank 4 at half the learning rate

Cost is counted in denoiser forwards, a backward as two. A plan that is cheaper per update gets more updates. Results
are appended to bench/results/ablation*.jsonl; `python bench/tables.py` puts them into docs/benchmarks.md.
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

from rlr_ray.recipes import load_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
RANK_4 = [
    "adapter={type: LORA, r: 4, lora_alpha: 4, target_modules: [attn2.to_out.0]}",
    "train.learning_rate=0.05",
]
SEEDS = (0, 1, 2)
DEMO_UPDATES = 40
# Variant -> overrides of configs/digits.yaml
VARIANTS: dict[str, list[str]] = {
    "rlr (default)": [],
    "without zeroth order": ["estimator.rest=none"],
    "without half order": ["estimator.sub_chain.length=0"],
    "first order on the last 3 alone": ["estimator.sub_chain.length=0", "estimator.rest=none"],
    "first order on the last 3 + REINFORCE": ["estimator.sub_chain.length=0", "estimator.rest=half_order"],
    "full backprop": ["estimator={preset: full_bp}"],
    "rlr-paper": ["estimator={preset: rlr-paper, zeroth_order: {count: 80, chunk_size: 20}}"],
    "ddpo": ["estimator={preset: ddpo}"],
}


def cost_per_update(overrides: list[str]) -> int:
    config = load_config(str(ROOT / "configs" / "digits.yaml"), overrides)
    forwards, backwards = config.cost(config.plan_shape.draw(0, 0))
    return forwards + 2 * backwards


def run(variant: str, seed: int, budget: int, base: list[str]) -> dict[str, Any]:
    """One run in a process of its own; its row."""
    overrides = [*base, *VARIANTS[variant]]
    updates = round(budget / cost_per_update(overrides))
    with tempfile.TemporaryDirectory() as folder:
        keys = ["cluster=none", f"seed={seed}", f"train.iterations={updates}", f"output_dir={folder}"]
        keys += [f"evaluation.every={updates // 4}", *overrides]
        command = [sys.executable, "-m", "rlr_ray", "train", "--config", "configs/digits.yaml"]
        command += [word for key in keys for word in ("--set", key)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "digits" / "summary.json").read_text())
        rows = pyarrow.parquet.read_table(Path(folder) / "digits" / "metrics.parquet").to_pylist()
    held_out = [row["held_out_reward"] for row in rows if row.get("held_out_reward") is not None]
    kept = ("steps", "denoiser_forwards", "denoiser_backwards", "reward_before", "reward_after", "gain", "gain_se")
    kept += ("judge_before", "judge_after", "seconds", "versions")
    quarters = {"held_out_by_quarter": held_out[:3]}  # of the cost: 1/4, 1/2, 3/4
    return {"variant": variant, "seed": seed} | quarters | {name: summary[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--rank4", action="store_true", help="rank 4 at half the learning rate")
    options = parser.parse_args()
    base, results = (RANK_4, "ablation_rank4.jsonl") if options.rank4 else ([], "ablation.jsonl")
    file = RESULTS / results
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    seen = {(row["variant"], row["seed"]) for row in done}
    budget = DEMO_UPDATES * cost_per_update([])

    def run_and_keep(job: tuple[str, int]) -> None:
        row = run(*job, budget, base)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(
            f"{row['variant']}, seed {row['seed']}: gain {row['gain']:.3f}, judge {row['judge_after']:.3f}", flush=True
        )

    names = list(VARIANTS)
    jobs_in_order = [(name, seed) for part in (names[:4], names[4:]) for seed in SEEDS for name in part]
    todo = [job for job in jobs_in_order if job not in seen]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run_and_keep, todo))


if __name__ == "__main__":
    main()
