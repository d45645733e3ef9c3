"""Short runs of the embedded model, for tests of everything above the core."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from safetensors.torch import load_file

from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.utils.console import messages_by

TIMED = ("seconds", "rollouts_per_s", "reward_s")  # columns of an update that do not repeat
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

SMALL: dict[str, Any] = {  # on top of it, for tests of many runs
    "sampler": {"steps": 4},
    "train": {"chains": 4, "chains_per_prompt": 2},
    "estimator": {"zeroth_order": {"count": 2}},
    "evaluation": {"chains": 2, "pictures": 2, "judge": None},
}


def short_run(folder: Path, **changes: Any) -> RunConfig:
    """A run of four updates in this process, with `changes` put on top."""
    return parse_config(merge(RECIPE | {"output_dir": str(folder)}, changes))


def small_run(folder: Path, **changes: Any) -> RunConfig:
    return short_run(folder, **merge(SMALL, changes))


def small_recipe(folder: Path) -> Path:
    """A file with the recipe of a small run in folder/runs."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(merge(merge(RECIPE, SMALL), {"output_dir": str(folder / "runs")})))
    return file


def outcome(folder: Path) -> dict[str, Any]:
    """All of a finished run that repeats."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = pyarrow.parquet.read_table(folder / "metrics.parquet").to_pylist()
    for timed in TIMED:
        summary.pop(timed, None)
        for row in rows:
            row.pop(timed)
    adapter = {name: value.tolist() for name, value in load_file(folder / summary["adapter"]).items()}
    return summary | {"name": "", "rows": rows, "adapter": adapter}


@contextmanager
def logged() -> Iterator[list[str]]:
    """What rlr_ray logs until the block ends, from INFO up."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    with messages_by(handler):
        yield texts
