"""The sizes at which speed is measured, each as a recipe and its engine.

sd14, sdxl: true shapes, random weights; tiny_sd, tiny_sdxl: the same architectures, small enough for a CPU;
digits: the demo's recipe, in this process.
"""

from __future__ import annotations

from typing import Any

import torch
from random_pipelines import DTYPES, FAMILIES, saved  # beside this file
from whole_runs import ROOT

from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import load_config, parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.train.engine import Engine

SIZES = (*FAMILIES, "digits")
TRUE_SIZES = ("sd14", "sdxl")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ADAPTER = {"type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def recipe(size: str, **changes: Any) -> RunConfig:
    """The recipe of a size with some keys changed."""
    if size == "digits":
        fixed = ["cluster=none", f"device={DEVICE.type}", "output_dir=build/bench"]
        values = load_config(str(ROOT / "configs" / "digits.yaml"), fixed).model_dump(exclude_unset=True)
        return parse_config(merge(values, changes))
    model = {"name": FAMILIES[size], "path": str(saved(size, DEVICE)), "dtype": DTYPES[size]}
    values = {
        "name": "bench",
        "output_dir": "build/bench",
        "device": DEVICE.type,
        "cluster": "none",
        "model": model | ({"decode_slice": 4} if size in TRUE_SIZES else {}),
        "adapter": ADAPTER,
        "sampler": {"steps": 50 if size in TRUE_SIZES else 6, "guidance_scale": 5.0},
        "reward": {"name": "random_pipelines:brightness", "invalid": 0.0},  # random weights may overflow
        "prompts": ["a handwritten seven"],
        "estimator": {
            "first_order_steps": 1,  # with h = 2, the paper's
            "sub_chain": {"length": 2},
            "half_order": {"baseline": "batch"},
            "zeroth_order": {"count": 2, "chunk_size": 2},
        },
        "train": {"chains": 2, "chains_per_prompt": 1, "chunk_size": 1},
    }
    return parse_config(merge(values, changes))


def engine(size: str, **changes: Any) -> Engine:
    """The engine of a size; the threads of a CPU are one."""
    return Engine(recipe(size, **changes))
