"""The paper's ablation on the embedded model: one job under many plans, at equal denoiser cost.

    python bench/ablation.py --jobs 2            # resumable: a finished run is not run again
    python bench/ablation.py --jobs 2 --rank4    # the same with an adapter of rank 4

Every plan first gets each learning rate once, on a seed of its own; the best one then runs on the seeds of the table.
Cost is counted in denoiser forwards, a backward as two: a plan that is cheaper per update gets more updates. Results
are appended to bench/results/ablation*.jsonl; `python bench/tables.py` turns them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from typing import Any

from whole_runs import RESULTS, SWEEP_SEED, Job, best_rate, cost_per_update, read, run, run_missing  # beside this file

UPDATES = 40  # of the demo; all others get as many as cost the same
SEEDS = (0, 1, 2, 3, 4)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--rank4", action="store_true", help="an adapter of rank 4")
    parser.add_argument("--plans", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these alone")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds of the table")
    options = parser.parse_args()
    base, results = ([*BASE, *RANK_4], "ablation_rank4.jsonl") if options.rank4 else (BASE, "ablation.jsonl")
    file = RESULTS / results

    def make(job: Job) -> dict[str, Any]:
        overrides = [*base, *VARIANTS[job[0]]]
        return run(job, round(UPDATES * cost_per_update(base) / cost_per_update(overrides)), overrides)[0]

    def run_all(jobs: list[Job]) -> None:
        run_missing(file, jobs, make, options.jobs)

    run_all([(name, rate, SWEEP_SEED) for name in options.plans for rate in LEARNING_RATES])
    rows = read(file)
    run_all([(name, best_rate(rows, name), seed) for seed in SEEDS[: options.seeds] for name in options.plans])


if __name__ == "__main__":
    main()
