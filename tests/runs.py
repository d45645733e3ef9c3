"""Short runs, for tests of everything above the core. CPU seconds of one, on one thread, after the process's first,
with report and pictures, which are half of it:

    small_run(tmp_path)                    1.0  4 updates of 4 chains of 4 steps, random weights: the default
    short_run(tmp_path, model=tiny())      1.5  4 updates of 8 chains of 5 steps, judged; random weights
    short_run(tmp_path)                    2.8  with the embedded digits: where pictures or gains matter

A test changes keys by keywords: small_run(tmp_path, train={"iterations": 1}). Nothing of a finished run that tests only
read is made twice: make it in a fixture of scope "module". A command is called in this process: main(["train", ...]).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import parse_config, resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.core.sums import Reduce
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
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
        "preset": "custom",
        "half_order": {"baseline": "prompt", "weight": "auto"},
        "first_order": {"steps": 1},
        "sub_chain": {"length": 2},
        "zeroth_order": {"count": 8, "chunk_size": 4},
    },
    "train": {
        "iterations": 4,
        "chains": 8,
        "chains_per_prompt": 4,
        "chunk_size": 4,
        "learning_rate": 0.02,
        "warmup": 0,
        "schedule": "constant",
        "own_norms": False,
        "clip_update": None,
        "max_change": None,
        "checkpoint_every": 1,
    },
    "guards": {"ema": None, "keep": "last", "step_back": False},  # tests/train/test_steady.py: these, and the above
    "evaluation": {"chains": 8, "every": None, "pictures": 4, "judge": {"name": "digits_judge"}},
    "cluster": "none",
}

SMALL: dict[str, Any] = {  # on top of it, for tests of many runs
    "sampler": {"steps": 4},
    "train": {"chains": 4, "chains_per_prompt": 2, "chunk_size": 2},
    "estimator": {"zeroth_order": {"count": 2, "chunk_size": 2}},
    "evaluation": {"chains": 2, "pictures": 2, "judge": None},
}


def misled(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:  # [B]
    """Brightness, whose gradient points the other way: what climbs it falls."""
    bright = images.mean((1, 2, 3))
    return 2 * bright.detach() - bright


misled.differentiable = True  # type: ignore[attr-defined]
FALLING: dict[str, Any] = {  # on top of a small run: its reward falls by many standard errors within four updates
    "reward": {"name": "tests.runs:misled"},
    "adapter": {"r": 4, "target_modules": ["conv_out"]},
    "estimator": {
        "first_order": {"steps": "all", "clip": 1.0},
        "half_order": {"weight": 1.0},
        "sub_chain": {"length": 0},
        "rest": "none",
    },
    "train": {"iterations": 30, "chains_per_prompt": 1, "learning_rate": 0.3, "own_norms": True, "checkpoint_every": 3},
    "guards": {"ema": 0.5, "step_back": True},
}


def _tiny_folder() -> str:
    import diffusers
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from rlr_ray.assets import DIGITS

    diffusers.utils.logging.disable_progress_bar()
    folder = tempfile.mkdtemp(prefix="tiny_pipeline_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(DIGITS / "pipeline")
    one_block = {"block_out_channels": (8,), "attention_head_dim": 2, "norm_num_groups": 2, "mid_block_type": None}
    one_block |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.register_modules(unet=UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_block))
    pipeline.save_pretrained(folder)
    return folder


def tiny() -> dict[str, Any]:
    """A recipe's `model`: the embedded pipeline with a U-Net of 13,676 random weights, of the same class."""
    if "TINY_PIPELINE" not in os.environ:  # processes that this one starts share it
        os.environ["TINY_PIPELINE"] = _tiny_folder()
    return {"name": "stable_diffusion", "path": os.environ["TINY_PIPELINE"]}


def short_run(folder: Path, **changes: Any) -> RunConfig:
    """A run of four updates in this process, with `changes` put on top."""
    return parse_config(merge(RECIPE | {"output_dir": str(folder)}, changes))


def small_run(folder: Path, **changes: Any) -> RunConfig:
    """A run of four small updates of a pipeline of random weights, with `changes` put on top."""
    return short_run(folder, **merge(SMALL | {"model": tiny()}, changes))


def small_recipe(folder: Path) -> Path:
    """A file with the recipe of a small run in folder/runs."""
    file = folder / "recipe.yaml"
    keys = merge(RECIPE, SMALL | {"model": tiny(), "output_dir": str(folder / "runs")})
    file.write_text(yaml.safe_dump(keys))
    return file


_ENGINES: dict[str, Engine] = {}


def shared_engine(config: RunConfig, place: str = "here") -> Engine:
    """An engine for this config; at one place, all that differ in the plan alone share model, prompts and rewards."""
    keys = place + config.model_dump_json(exclude={"estimator", "train", "guards"})
    if keys not in _ENGINES:
        _ENGINES[keys] = Engine(config)
    return _ENGINES[keys].under(resolve(config))


def train_here(
    config: RunConfig,
    on_row: Callable[[dict[str, Any]], Any] = lambda row: None,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    shown: bool = False,
) -> RunFolder:
    """Train in this process; `stop_after` so many updates it is interrupted.

    Only if it is `shown` does it leave the report and pictures at its end, which take half of a small run's time.
    """

    def report(row: dict[str, Any]) -> None:
        on_row(row)
        if row["step"] + 1 == stop_after:
            raise KeyboardInterrupt

    engine, folder = Engine(config), RunFolder(config)
    folder.check(resume=resume, overwrite=False)
    folder.begin(resume=resume)
    with nullcontext() if shown else nothing_shown():
        train(engine, None, report)
    return folder


@contextmanager
def nothing_shown() -> Iterator[None]:
    """Runs of this process leave neither report nor pictures until the block ends."""
    results = "rlr_ray.train.results.Results"
    with patch(f"{results}._report", lambda *_: None), patch(f"{results}._save_pictures", lambda *_: None):
        yield


def shared(processes: int, work: Callable[[int, Reduce], Any]) -> list[Any]:
    """The outcome of each of some threads, whose `reduce` sums over all of them."""
    barrier, buffers = threading.Barrier(processes, timeout=60), dict[int, Tensor]()

    def run(rank: int) -> Any:
        def reduce(value: Tensor) -> Tensor:
            buffers[rank] = value.clone()
            barrier.wait()
            total = torch.stack([buffers[other] for other in range(processes)]).sum(0)
            barrier.wait()
            return total

        return work(rank, reduce)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


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
