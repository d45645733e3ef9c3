"""Whole runs with other spans of the zeroth-order directions, at equal denoiser cost.

    python bench/directions_runs.py --jobs 2                # 80 pairs an update; resumable
    python bench/directions_runs.py --jobs 2 --pairs 320

The demo's 40 updates at two learning rates. Results are appended to bench/results/directions_runs.jsonl.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

from ablation import BASE, UPDATES  # beside this file, as the next one
from whole_runs import RESULTS, Job, cost_per_update, read, run

FILE = RESULTS / "directions_runs.jsonl"
RATES = (0.1, 0.03)
SPANS = {
    "principal components": [],
    "smoothed gradients": ["estimator.zeroth_order.span=guides"],
    "isotropic": ["estimator.zeroth_order.directions=isotropic"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--pairs", type=int, default=80, help="an update")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spans", nargs="+", choices=SPANS, default=list(SPANS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    options = parser.parse_args()
    base = [*BASE, f"estimator.zeroth_order.count={options.pairs}"]

    def keep(job: Job) -> None:
        overrides = [*base, *SPANS[job[0]]]
        updates = round(UPDATES * cost_per_update(base) / cost_per_update(overrides))
        row = run(job, updates, overrides)[0] | {"pairs": options.pairs}
        with FILE.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{options.pairs} pairs, {job}: gain {row['gain']:.3f}, judge {row['judge_after']:.3f}", flush=True)

    seen = {(row["variant"], row["learning_rate"], row["seed"], row["pairs"]) for row in read(FILE)}
    jobs = [(span, rate, seed) for seed in range(options.seeds) for rate in options.rates for span in options.spans]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(keep, [job for job in jobs if (*job, options.pairs) not in seen]))


if __name__ == "__main__":
    main()
