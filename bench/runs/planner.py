"""The planner on the embedded model: its choice for three budgets, and its memory model against real peaks.

python -m bench.runs.planner     # writes planner.json and closed_form.json in bench/results
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from bench.common import RESULTS, ROOT, options, write_json
from bench.runs.sweep import load_sweep
from rlr_ray.config.recipe import load_config
from rlr_ray.lab.measure import candidate_of, estimate_batch
from rlr_ray.lab.options import Choice
from rlr_ray.lab.planner import GIB, Planner
from rlr_ray.lab.plans import covered, truncated, with_plan
from rlr_ray.utils.environment import prepare_process
from rlr_ray.utils.memory import peak_bytes

BUDGETS_GIB = (0.012, 0.02, 0.05)
LENGTH_BUDGETS_GIB = (0.02, 0.025, 0.03, 0.045, 0.06)  # in which the sub-chain's length is to be chosen


def told(choice: Choice) -> dict[str, Any]:
    """A choice with what its numbers come to."""
    options = [asdict(one) | {"noise_scale": one.noise_scale, "price": one.price} for one in choice.options]
    best = asdict(choice.best) | {"price": choice.best.price}
    return asdict(choice) | {"options": options, "best": best, "error": choice.error}


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
            measured = peak_bytes(partial(estimate_batch, planner.subject, candidate, 0), planner.engine.device)
            yield {"part": kind, "steps": count, "predicted": predicted, "measured": measured}


def closed_form(batches: int) -> dict[str, int]:
    """The paper's h* for the job of the sweep `length`, by budget in GiB."""
    config = load_config(str(ROOT / "configs" / "digits.yaml"), load_sweep("length").set)
    planner = Planner(config, batches)
    rules = {f"{budget:g}": planner.rule(budget) for budget in LENGTH_BUDGETS_GIB}
    return {budget: rule.length for budget, rule in rules.items() if rule is not None}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, default=24, help="for the variances")
    args = parser.parse_args()
    prepare_process(1)
    config = load_config(str(ROOT / "configs" / "digits.yaml"), ["cluster=none"])
    planner = Planner(config, args.batches)
    choices = [planner.choose(budget) for budget in BUDGETS_GIB]
    memory = planner.probe.memory
    write_json(
        RESULTS / "planner.json",
        {
            "choices": [told(choice) for choice in choices],
            "memory": list(memory_rows(planner)),
            "model": asdict(memory),
            "held_gib": memory.held / GIB,
            "batch": planner.sweep.size,
            "trained_numbers": len(planner.subject.theta),
        },
    )
    write_json(RESULTS / "closed_form.json", closed_form(args.batches))
    for choice in choices:
        print(json.dumps({"budget": choice.budget_gib, "best": choice.best.name, "error": choice.error}))


if __name__ == "__main__":
    main()
