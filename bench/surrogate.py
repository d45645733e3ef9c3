"""A black-box reward with and without a surrogate: the embedded model's job under four plans, at equal denoiser cost.

    nice python bench/surrogate.py --jobs 1      # resumable: a finished run is not run again

`configs/digits.yaml` with `reward.differentiable: false`: no gradient of the reward is used. As in bench/ablation.py,
every plan first gets each learning rate once, on a seed of its own; the best one then runs on the seeds of the table;
cost is counted in denoiser forwards, a backward as two. Results are appended to bench/results/surrogate.jsonl.
"""

from __future__ import annotations

import argparse
from typing import Any

from ablation import UPDATES  # beside this file, as the next one
from whole_runs import RESULTS, SWEEP_SEED, Job, best_rate, cost_per_update, read, run, run_missing

FILE = RESULTS / "surrogate.jsonl"
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


def make(job: Job) -> dict[str, Any]:
    overrides = [*BASE, *VARIANTS[job[0]]]
    row, summary, rows = run(job, round(BUDGET / cost_per_update(overrides)), overrides)
    row["correlations"] = [row.get("surrogate_correlation") for row in rows]
    row["weights"] = [row.get("half_order_weight") for row in rows]
    return row | {"surrogate": summary["surrogate"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    options = parser.parse_args()

    def run_all(jobs: list[Job]) -> None:
        run_missing(FILE, jobs, make, options.jobs)

    run_all([(name, rate, SWEEP_SEED) for name in VARIANTS for rate in LEARNING_RATES])
    rows = read(FILE)
    run_all([(name, best_rate(rows, name), seed) for seed in SEEDS for name in VARIANTS])


if __name__ == "__main__":
    main()
