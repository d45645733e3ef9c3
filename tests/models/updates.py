"""Updates of all three orders on a small pipeline, with a reward whose gradient is plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder


def recipe(name: str, folder: Path, output: Path, **changes: Any) -> RunConfig:
    """A run of six updates, with `changes` put on top."""
    base = {
        "name": "run",
        "output_dir": str(output),
        "model": {"name": name, "path": str(folder), "height": 8, "width": 8},
        "sampler": {"steps": 3, "eta": 0.7, "guidance_scale": 1.0},
        "reward": {"name": "tests.models.tiny_flow:brightness"},
        "prompts": ["a handwritten two", "a handwritten seven"],
        "estimator": {
            "first_order_steps": 1,
            "sub_chain": {"length": 1},
            "zeroth_order": {"count": 4, "chunk_size": 4},
        },
        "train": {
            "iterations": 6,
            "chains": 8,
            "chains_per_prompt": 4,
            "chunk_size": 4,
            "learning_rate": 0.2,
            "checkpoint_every": 1,
        },
        "evaluation": {"chains": 32, "chunk_size": 32, "pictures": 2},
        "cluster": "none",
    }
    return parse_config(merge(base, changes))


def run(config: RunConfig, *, resume: bool = False, stop_after: int | None = None) -> dict[str, Any]:
    def report(row: dict[str, Any]) -> None:
        if row["step"] + 1 == stop_after:
            raise KeyboardInterrupt

    folder, engine = RunFolder(config), Engine(config)
    folder.begin(resume=resume)
    train(engine, engine.local_rollouts, report)
    return folder.load_summary()


def updates_raise_the_reward(config: Callable[[Path], RunConfig], folder: Path) -> Path:
    """Assert that the reward rises, and that a run stopped after 4 goes on to the same bits; where the run lies."""
    whole, broken = config(folder / "whole"), config(folder / "broken")
    summary = run(whole)
    assert summary["gain"] > 5 * summary["gain_se"] > 0
    with pytest.raises(KeyboardInterrupt):
        run(broken, stop_after=4)
    assert run(broken, resume=True)["gain"] == summary["gain"]
    first, second = (load_file(config.folder / summary["adapter"]) for config in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert summary["adapter"].startswith("lora/")
    return whole.folder
