"""What `learning_rate: auto` gives on the models and adapters at hand, beside a rule of thumb: a minute.

    python -m bench.runs.learning_rate

The rule: proportional to 1 / (alpha / sqrt(r) x sqrt(adapted modules)), by which the outputs of these modules change,
set to 0.03 on the embedded digits. Predicted: within a factor of 1.5 of auto where r or alpha are others, and further
from it where other modules or another model are, whose outputs weigh less or more in the prediction.
"""

from __future__ import annotations

import math
from typing import Any

from bench.common import RESULTS, ROOT, Row, options, write_json
from rlr_ray.config.recipe import parse_config, read_recipe
from rlr_ray.train.learning_rate import FRACTION, PART, measured_rate
from rlr_ray.train.picture_engine import PictureEngine

FILE = RESULTS / "learning_rate.json"
OUT = ["attn2.to_out.0"]
CROSS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
ALL = ["to_q", "to_k", "to_v", "to_out.0"]


def lora(**keys: Any) -> dict[str, Any]:
    return {"type": "LORA", "r": 1, "lora_alpha": 4, "target_modules": OUT} | keys


# By label: a recipe's name and keys on top of it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "digits, LoRA r 1, alpha 4": ("digits", {"adapter": lora()}),
    "alpha 1": ("digits", {"adapter": lora(lora_alpha=1)}),
    "alpha 16": ("digits", {"adapter": lora(lora_alpha=16)}),
    "r 4": ("digits", {"adapter": lora(r=4)}),
    "r 4, alpha 16": ("digits", {"adapter": lora(r=4, lora_alpha=16)}),
    "r 16, alpha 16": ("digits", {"adapter": lora(r=16, lora_alpha=16)}),
    "all of attn2": ("digits", {"adapter": lora(target_modules=CROSS)}),
    "r 4, all attention": ("digits", {"adapter": lora(r=4, target_modules=ALL)}),
    "DoRA r 1, alpha 4": ("digits", {"adapter": lora(use_dora=True)}),
    "LoHa r 1, alpha 4": ("digits", {"adapter": {"type": "LOHA", "r": 1, "alpha": 4, "target_modules": OUT}}),
    "IA3": ("digits", {"adapter": {"type": "IA3", "target_modules": CROSS[1:3], "feedforward_modules": []}}),
    "BOFT, blocks of 4": ("digits", {"adapter": {"type": "BOFT", "boft_block_size": 4, "target_modules": OUT}}),
    "another initial adapter": ("digits", {"adapter": lora(seed=1)}),
    "50 steps, guidance 3": ("digits", {"sampler": {"steps": 50, "eta": 1.0, "guidance_scale": 3.0}}),
    "bfloat16": ("digits", {"model": {"name": "digits", "dtype": "bfloat16"}}),
    "moving digits, LoRA r 1, alpha 4": ("moving_digits", {}),
}


def main() -> None:
    options(__doc__).parse_args()
    rows = [measured(label, *case) for label, case in CASES.items()]
    said = {"command": "python -m bench.runs.learning_rate", "fraction": FRACTION, "part": PART}
    write_json(FILE, said | {"rows": rows})


def measured(label: str, name: str, keys: dict[str, Any]) -> Row:
    recipe = read_recipe(str(ROOT / "configs" / f"{name}.yaml"))
    config = parse_config(recipe | keys | {"cluster": "none"})
    engine = PictureEngine(config)
    model: Any = engine.model
    modules = sum("lora_A" in name for vector in model.tuned.vectors.values() for name in vector.shapes)
    scale = config.adapter.options.get("lora_alpha", 0) / math.sqrt(config.adapter.options.get("r", 1))
    rule = float(f"{0.03 * 4 * math.sqrt(7) / (scale * math.sqrt(modules)):.2g}") if modules else None
    row = {"case": label, "numbers": len(engine.model.initial_theta), "modules": modules or None}
    row |= {"auto": measured_rate(engine), "rule": rule}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
