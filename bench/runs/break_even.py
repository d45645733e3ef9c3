"""Half against zeroth order on the still and on the moving digits, for adapters of several sizes.

python -m bench.runs.break_even     # writes bench/results/break_even.jsonl; `python -m bench.pages` makes a table of it

Both own all steps but the last, which is first order's. What has been measured is not measured again.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from bench.common import RESULTS, ROOT, append_row, options, read_rows
from rlr_ray.config.recipe import load_config
from rlr_ray.lab.compare import Laboratory
from rlr_ray.lab.measure import variance, variance_se
from rlr_ray.lab.plans import reinforce
from rlr_ray.lab.reference import chain_gradients
from rlr_ray.utils.environment import prepare_process

FILE = RESULTS / "break_even.jsonl"
RECIPES = ("digits", "moving_digits")
COST = 20_000.0  # denoiser forwards a plan
CHAINS = 200  # whose own gradients are taken
ZEROTH = {
    "preset": "custom",
    "first_order": {"steps": 1},
    "sub_chain": {"length": 0},
    "rest": "zeroth_order",
    "zeroth_order": {"directions": "isotropic", "weight": 1.0},
}
PLANS = {"half_order": reinforce(1), "zeroth_order": ZEROTH}
ADAPTERS = {  # the smallest first
    "IA3, one layer": "{type: IA3, target_modules: [mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0], "
    "feedforward_modules: []}",
    "LoRA, rank 1": "{type: LORA, r: 1, lora_alpha: 4, target_modules: [attn2.to_out.0]}",
    "LoRA, rank 4": "{type: LORA, r: 4, lora_alpha: 4, target_modules: [to_q, to_k, to_v, to_out.0]}",
}


def measured(recipe: str, adapter: str, batches: int) -> dict[str, Any]:
    """Variances per chain, of zeroth order per pair."""
    config = load_config(str(ROOT / "configs" / f"{recipe}.yaml"), ["cluster=none", f"adapter={ADAPTERS[adapter]}"])
    laboratory = Laboratory(config, None, None, batches)
    reference = laboratory.measure_reference()
    subject, results = laboratory.subject, {}
    for name, keys in PLANS.items():
        measurement = laboratory.measure(laboratory.candidate(name, keys, reference), keys, reference, COST).measurement
        kept = ("variance", "variance_se", "relative_bias", "relative_bias_se", "batches")
        results[name] = {key: getattr(measurement, key) for key in kept} | {"term": measurement.term_variances[name]}
    # Not of whole batches: chains of one prompt are alike, so a batch's variance is not a chain's over their number.
    rows = [steps[:-1].sum(0) for steps in chain_gradients(subject, math.ceil(CHAINS / len(subject.groups)))]
    exact = torch.cat(rows)[:CHAINS]  # [n, P]
    halves = exact[0::2].double().mean(0), exact[1::2].double().mean(0)
    return {
        "recipe": recipe,
        "adapter": adapter,
        "trained_numbers": len(subject.theta),
        "latent_shape": laboratory.engine.model.latent_shape,
        "steps": len(subject.sampler.schedule),
        "squared_norm": float(halves[0] @ halves[1]),  # of what both estimate; unbiased
        "pathwise_variance": variance(exact),
        "pathwise_variance_se": variance_se(exact),
        "plans": results,
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, default=32, help="of the reference, and at most of a plan")
    parser.add_argument("--recipe", choices=RECIPES, help="this one alone")
    args = parser.parse_args()
    prepare_process(1)
    known = {(row["recipe"], row["adapter"]) for row in read_rows(FILE)}
    for recipe in [args.recipe] if args.recipe else RECIPES:
        for adapter in ADAPTERS:
            if (recipe, adapter) not in known:
                row = measured(recipe, adapter, args.batches)
                append_row(FILE, row)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
