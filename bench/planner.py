"""The planner on the embedded model: its choice for three budgets, and its memory model against real peaks.

python bench/planner.py     # writes bench/results/planner.json; `python bench/tables.py` makes tables of it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlr_ray.config.recipe import load_config
from rlr_ray.lab.measure import candidate_of, estimate_batch
from rlr_ray.lab.planner import GIB, Planner
from rlr_ray.lab.plans import covered, truncated, with_plan
from rlr_ray.lab.report import write_json
from rlr_ray.utils.memory import peak_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "planner.json"
BUDGETS_GIB = (0.012, 0.02, 0.05)


def memory_rows(planner: Planner) -> Iterator[dict[str, Any]]:
    """First order on the last 1 .. 8 steps, plain and checkpointed, and sub-chains of 1 .. 8: peaks of a batch."""
    for count in range(1, 9):
        kinds = {
            "first order": (truncated(count), False),
            "first order, checkpointed": (truncated(count), True),
            "half order": (covered(0, count), False),
        }
        for kind, (keys, saving) in kinds.items():
            config = with_plan(planner.config, keys | {"checkpoint_steps": saving})
            candidate = candidate_of(kind, config, planner.subject, None, [])
            predicted = max(planner.probe.memory.parts(config.plan_shape, saving).values())
            measured = peak_bytes(lambda c=candidate: estimate_batch(planner.subject, c, 0), planner.engine.device)
            yield {"part": kind, "steps": count, "predicted": predicted, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=48, help="for the variances")
    options = parser.parse_args()
    config = load_config(str(ROOT / "configs" / "digits.yaml"), ["cluster=none"])
    planner = Planner(config, lambda text: print(text, flush=True), options.batches)
    choices = [planner.choose(budget) for budget in BUDGETS_GIB]
    memory = planner.probe.memory
    write_json(
        RESULTS,
        {
            "choices": [asdict(choice) | {"error": choice.error} for choice in choices],
            "memory": list(memory_rows(planner)),
            "model": asdict(memory),
            "held_gib": memory.held / GIB,
            "batch": planner.families.size,
            "trained_numbers": len(planner.subject.theta),
        },
    )
    for choice in choices:
        print(json.dumps({"budget": choice.budget_gib, "best": choice.best.name, "error": choice.error}))


if __name__ == "__main__":
    main()
