"""Short runs of the embedded model, for tests of everything above the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlr_ray.config import RunConfig
from rlr_ray.presets import merge
from rlr_ray.recipes import parse_config

RECIPE: dict[str, Any] = {
    "name": "short",
    "model": {"name": "digits"},
    "adapter": {"type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["attn2.to_out.0"]},
    "sampler": {"steps": 5, "guidance_scale": 1.0},
    "reward": {"name": "digits"},
    "prompts": ["a handwritten three", "a handwritten eight"],
    "estimator": {
        "first_order_steps": 1,
        "sub_chain": {"length": 2},
        "zeroth_order": {"count": 8, "chunk_size": 2},
    },
    "train": {
        "iterations": 4,
        "chains": 8,
        "chains_per_prompt": 4,
        "chunk_size": 2,
        "learning_rate": 0.02,
        "checkpoint_every": 1,
    },
    "evaluation": {"chains": 8, "pictures": 4, "judge": {"name": "digits_judge"}},
    "cluster": "none",
}


def short_run(folder: Path, **changes: Any) -> RunConfig:
    """A run of four updates in this process, with `changes` put on top."""
    return parse_config(merge(RECIPE | {"output_dir": str(folder)}, changes))
