"""Two rewards in one run, and a guard against a gamed one, on the embedded model.

    nice python bench/rewards.py --jobs 1      # resumable: a finished run is not run again

The classifier is differentiable, the size as JPEG a black box; both are in deviations of the base model's scores. All
runs cost as many denoiser forwards as the demo, a backward as two. Weights, learning rates and penalty were chosen by a
few runs on seed 0. Results are appended to bench/results/rewards.jsonl.
"""

from __future__ import annotations

import argparse
from typing import Any

from ablation import UPDATES  # beside this file, as the next one
from whole_runs import RESULTS, Job, cost_per_update, run, run_missing

FILE = RESULTS / "rewards.jsonl"
SEEDS = (0, 1, 2)
BASE = ["cluster=none"]
BUDGET = UPDATES * cost_per_update(BASE)  # that of the demo
_JPEG = ["estimator={preset: ddpo}", "reward={name: jpeg_compressibility, normalize: true}"]
_JPEG += ["evaluation={chains: 400, judges: {digits_judge: {}, digits: {}}}"]
# Variant -> learning rate, overrides of configs/digits.yaml
VARIANTS: dict[str, tuple[float, list[str]]] = {
    "classifier": (0.1, ["evaluation={chains: 400, judges: {digits_judge: {}, jpeg_compressibility: {}}}"]),
    "JPEG": (0.03, _JPEG),
    "both": (
        0.03,
        [
            "reward=null",
            "rewards={digits: 1, jpeg_compressibility: 0.3}",
            "evaluation={chains: 400, judges: {digits_judge: {}}}",
        ],
    ),
    "JPEG, guarded": (0.01, [*_JPEG, "guards={kl_penalty: 0.02, kl_steps: 3, ema: 0.9}"]),
}


def make(job: Job) -> dict[str, Any]:
    _, overrides = VARIANTS[job[0]]
    overrides = [*BASE, *overrides]
    row, summary, _ = run(job, round(BUDGET / cost_per_update(overrides)), overrides)
    trained = {name: row[name] for name in ("gain", "gain_se")}
    trained |= {"before": row["reward_before"], "after": row["reward_after"]}
    row["scores"] = {"digits": trained} | row["scores"]  # of the classifier alone; the others have it
    return row | {name: summary[name] for name in ("kl", "diversity_before", "diversity_after", "warnings")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    options = parser.parse_args()
    jobs = [(name, rate, seed) for seed in SEEDS for name, (rate, _) in VARIANTS.items()]
    run_missing(FILE, jobs, make, options.jobs)


if __name__ == "__main__":
    main()
