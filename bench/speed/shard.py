"""Peak memory of a worker whose frozen base is cut among the workers (`cluster.worker.shard`), at 1 and 2 of them.

    python -m bench.speed.shard                # a transformer of 6 blocks, .5 GB: some minutes
    python -m bench.speed.shard --layers 2     # seconds

A transformer as Stable Diffusion 3's with random weights in float32 and LoRA on its attention, processes of gloo on the
CPU, and half order of two steps of one chain, with and without `model.gradient_checkpointing`. Held: bytes of the
pipeline's weights in the process. Peak: these, and by how much the process's resident memory was at most above what it
was before, at the second estimate; gathered blocks and gloo's buffers are in it. glibc is told to give memory back
(MALLOC_MMAP_THRESHOLD_), which it otherwise keeps in pieces. The gradient of every worker is that of the whole weights,
bit for bit, or the bench fails.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import CLIPTokenizer

from bench.common import RESULTS, options, write_json
from rlr_ray.assets import DIGITS
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler
from rlr_ray.models.loading import load_model
from rlr_ray.models.sharding import Shards
from rlr_ray.utils.environment import prepare_process

FILE = RESULTS / "shard.json"
WORKERS = (1, 2)
HEADS, HEAD, SIZE = 12, 64, 32  # of the transformer: heads, numbers of a head, latent pixels a side
CPU = torch.device("cpu")


def save_pipeline(folder: Path, layers: int) -> None:
    from scripts.small_pipelines import clip_config, sd3_transformer, stable_diffusion_3
    from tests.models.tiny import FLOWS, tiny_vae

    torch.manual_seed(0)
    transformer = sd3_transformer(SIZE, layers=layers, heads=HEADS, head=HEAD, patch_size=2)
    clip = CLIPTokenizer.from_pretrained(DIGITS / "pipeline" / "tokenizer")
    stable_diffusion_3(transformer, tiny_vae(**FLOWS), clip_config(clip), (clip, None), shift=3.0).save_pretrained(
        folder
    )


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS, what it has now, or VmHWM, the most that it had."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def measure(rank: int, workers: int, folder: Path, again: bool, results: Any) -> None:
    """One worker's row, in a process of its own."""
    prepare_process(1)
    shards = None
    if workers > 1:
        store = dist.FileStore(str(folder / f"store_{again}"), workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
        shards = Shards(CPU)
    config = ModelConfig(name="stable_diffusion_3", path=str(folder), gradient_checkpointing=again)
    adapter = AdapterConfig(r=4, target_modules=["attn.to_q", "attn.to_out.0"])
    sampler = SamplerConfig(steps=3, guidance_scale=1.0, eta=0.7)
    model: Any = load_model(config, adapter, sampler, CPU, shards=shards)
    chain = Sampler(model, model.schedule)
    start, noise, prompts = model.begin([1], model.encode(["a handwritten three"]))
    gradients: list[torch.Tensor] = []

    def estimate() -> None:
        trajectory = chain.sample(model.initial_theta, start, noise, prompts, stop=2)
        gradients.append(half_order(chain, model.initial_theta, trajectory, range(0, 2), torch.ones(1)))

    estimate()  # so that all is in memory that will be
    if shards is not None:
        shards.wait()
    held, before = model.weights(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.monotonic()
    estimate()
    seconds, peak = time.monotonic() - began, resident("VmHWM") - before
    if shards is not None:
        shards.wait()
        dist.destroy_process_group()
    bits = hashlib.sha256(gradients[0].numpy().tobytes()).hexdigest()
    blocks = len(shards.groups) if shards else 0
    row = {"workers": workers, "rank": rank, "again": again, "held_bytes": held, "peak_bytes": held + peak}
    results.put(row | {"seconds": seconds, "blocks": blocks, "bits": bits})


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    layers, rows = parser.parse_args().layers, []
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**22)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        save_pipeline(Path(name), layers)
        for again in (False, True):
            for workers in WORKERS:
                results = context.Queue()
                arguments = (workers, Path(name), again, results)
                processes = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(workers)]
                for process in processes:
                    process.start()
                rows += [results.get(timeout=1800) for _ in processes]
                for process in processes:
                    process.join()
    for again in (False, True):
        assert len({row["bits"] for row in rows if row["again"] == again}) == 1, "gradients differ"
    for row in sorted(rows, key=lambda row: (row["again"], row["workers"], row["rank"])):
        print({name: value for name, value in row.items() if name != "bits"}, flush=True)
    write_json(FILE, {"layers": layers, "rows": rows})


if __name__ == "__main__":
    main()
