"""`chains/*.parquet`: what a run saw, each chain's prompt, seed, rewards and last latent; the newest of them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import Process
from rlr_ray.utils.files import replace_file
from rlr_ray.utils.memory import GIB

logger = logging.getLogger(__name__)
_NAME = re.compile(r"updates_(\d+)_(\d+)_(\d+)\.parquet")  # first and last update, and whose: the process's rank


class ChainLog:
    """This process's chains since the last shard; a shard is written with every checkpoint, and the oldest go.

    A run that goes on from an earlier update begins by removing the shards beyond it, whose chains it draws again.
    """

    def __init__(self, engine: Engine, process: Process, limit_gib: float, done: int):
        """`done`: updates that the run goes on from; `limit_gib` is of all processes together."""
        self.engine, self.process, self.limit = engine, process, limit_gib * GIB / process.size
        self.folder = engine.config.folder / "chains"
        self.rows: list[pyarrow.Table] = []
        self.told = False
        for shard in shards(self.folder) if process.leads else ():
            if last_update(shard) >= done:
                shard.unlink(missing_ok=True)

    def add(self, step: int, estimate: GradientEstimate, total: WeightedSum) -> None:
        """Note an update's chains; rewards as they were given, before standards and weights."""
        train, scores = self.engine.config.train, total.scores(estimate.parts).double().cpu()  # [m, all B]
        for c, latents in sorted(estimate.latents.items()):
            indices = range(c * train.chunk_size, (c + 1) * train.chunk_size)
            columns: dict[str, Any] = {
                "update": pyarrow.array([step] * len(indices), pyarrow.int32()),
                "chain": pyarrow.array(list(indices), pyarrow.int32()),
                "prompt": [prompt.text for prompt in self.engine.train_prompts(step, indices)],
                "seed": pyarrow.array(self.engine.train_seeds(step, indices), pyarrow.int64()),
                "reward": estimate.rewards[list(indices)].double().tolist(),
            }
            columns |= {f"reward_{label}": scores[i, list(indices)].tolist() for i, label in enumerate(total.labels)}
            columns["latent"] = _halves(latents)
            self.rows.append(pyarrow.table(columns))

    def save(self) -> None:
        """Write what was added as a shard. A disk that fails costs chains, not the run."""
        rows, self.rows = self.rows, []
        if not rows:
            return
        first, last = rows[0]["update"][0].as_py(), rows[-1]["update"][0].as_py()
        shape = "x".join(map(str, self.engine.model.latent_shape))
        table = pyarrow.concat_tables(rows).replace_schema_metadata({"latent_shape": shape})
        file = self.folder / f"updates_{first:06d}_{last:06d}_{self.process.rank}.parquet"
        try:
            self.folder.mkdir(exist_ok=True)
            replace_file(file, lambda part: pyarrow.parquet.write_table(table, part))
            self._make_room()
        except OSError as error:
            if not self.told:
                logger.warning(f"chains of updates {first} to {last} are not kept: {error}; the run goes on")
            self.told = True

    def _make_room(self) -> None:
        """Remove the oldest of this process's shards beyond the limit; the newest stays."""
        kept = [shard for shard in shards(self.folder) if _matched(shard)[3] == str(self.process.rank)]
        while len(kept) > 1 and sum(shard.stat().st_size for shard in kept) > self.limit:
            kept.pop(0).unlink(missing_ok=True)


def shards(folder: Path) -> list[Path]:
    """The shards of a run's folder `chains`, the oldest first."""
    return sorted((file for file in folder.glob("*.parquet") if _NAME.fullmatch(file.name)), key=last_update)


def last_update(shard: Path) -> int:
    return int(_matched(shard)[2])


def _matched(shard: Path) -> re.Match[str]:
    match = _NAME.fullmatch(shard.name)
    assert match, f"{shard} is no shard"
    return match


def _halves(latents: Tensor) -> pyarrow.FixedSizeListArray:  # [B, ...] -> B lists of float16
    flat = latents.flatten(1).to("cpu", torch.float16)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.flatten().numpy()), flat.shape[1])
