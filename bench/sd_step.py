"""Memory and seconds of one update's parts at Stable Diffusion 1.4's true size, with random weights.

    python bench/sd_step.py                     # on a GPU: 512 x 512 pixels, LoRA rank 4 on the attention layers
    python bench/sd_step.py --size tiny         # a few seconds on a CPU: that the script works

No Ray, no network. Per line of the table: half order on a sub-chain of h = 1 .. 4 steps, first order on the last
K = 1, 3, T steps (plain and checkpointed), a perturbation rollout of one pair, and plain sampling of as many
chains for comparison. Memory is the peak beyond what the idle model holds. Results go to bench/results/sd_step.json;
`python bench/tables.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from rlr_ray.config import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.core.chain import sample_chain
from rlr_ray.core.first_order import first_order
from rlr_ray.core.gradient import Chains, rollout
from rlr_ray.core.half_order import half_order
from rlr_ray.core.plan import PlanShape
from rlr_ray.core.seeds import chain_noise
from rlr_ray.models.stable_diffusion import StableDiffusion
from rlr_ray.rewards.digit_classifier import WORDS
from scripts.building import build_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "sd_step.json"
ADAPTER = {"type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
STEPS = {"sd14": 50, "tiny": 6}


def random_pipeline(size: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Stable Diffusion 1.4's shapes (or tiny ones) without its weights."""
    tiny = size == "tiny"
    tokenizer = build_tokenizer(("handwritten", *WORDS), length=77)
    width = 32 if tiny else 768
    text = CLIPTextConfig(
        vocab_size=len(tokenizer) if tiny else 49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1 if tiny else 12,
        num_attention_heads=2 if tiny else 12,
        projection_dim=width,
        eos_token_id=tokenizer.eos_token_id,
    )
    channels, groups = ((16, 32), 8) if tiny else ((320, 640, 1280, 1280), 32)
    unet = UNet2DConditionModel(
        sample_size=8 if tiny else 64,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        attention_head_dim=8,
        cross_attention_dim=width,
        norm_num_groups=groups,
    )
    vae_channels = (16, 32) if tiny else (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        block_out_channels=vae_channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=16 if tiny else 512,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(dtype=dtype)


class Bench:
    """One model and one batch of chains; `measure` times a part and takes its peak memory."""

    def __init__(self, size: str, device: torch.device, batch: int):
        torch.manual_seed(0)
        self.device, self.steps = device, STEPS[size]
        dtype = "float32" if size == "tiny" else "bfloat16"
        self.model = StableDiffusion(
            random_pipeline(size, getattr(torch, dtype)),
            ModelConfig(dtype=dtype),  # type: ignore[arg-type]
            AdapterConfig(**ADAPTER),
            SamplerConfig(steps=self.steps, guidance_scale=5.0),
            device,
        )
        self.theta = self.model.initial_theta
        self.chains = self._chains(batch)
        self.trajectory = self._sample(self.chains)

    def _chains(self, batch: int) -> Chains:
        shape = self.model.latent_shape
        starts, noises = zip(*(chain_noise(seed, self.steps, shape) for seed in range(batch)), strict=True)
        conditioning = self.model.encode(["a handwritten seven"] * batch)
        start, noise = torch.stack(starts).to(self.device), torch.stack(noises, dim=1).to(self.device)
        return Chains(start, noise, conditioning, lambda latent: self.model.decode(latent).mean((1, 2, 3)))

    def _sample(self, chains: Chains, **options: Any) -> Any:
        start = (chains.x_start, chains.noise, chains.conditioning)
        return sample_chain(self.model, self.theta, self.model.schedule, *start, **options)

    def measure(self, part: Callable[[], Any], repeats: int) -> dict[str, float]:
        """Least seconds of the repeats after one that is not counted, and the peak memory in GiB."""
        part()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            part()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else float("nan")
        return {"seconds": min(seconds), "peak_gib": peak}

    def first_order(self, count: int, checkpoint_steps: bool) -> Tensor:
        head = self._sample(self.chains, stop=0)
        latents = self.trajectory.latents[: self.steps - count + 1]
        trajectory = type(head)(latents, head.noise, head.conditioning)
        arguments = (self.model, self.theta, self.model.schedule, trajectory, self.chains.objective)
        return first_order(*arguments, checkpoint_steps=checkpoint_steps)[0]

    def half_order(self, length: int) -> Tensor:
        start = (self.steps - length) // 2
        advantage = torch.ones(len(self.chains.x_start), device=self.device)
        arguments = (self.model, self.theta, self.model.schedule, self.trajectory)
        return half_order(*arguments, range(start, start + length), advantage)

    def rollout(self) -> Any:
        plan = PlanShape(self.steps, 0, 0).draw(0)
        count = len(self.chains.x_start)
        directions = torch.randn(count, len(self.theta), device=self.device)
        return rollout(self.model, self.theta, self.model.schedule, plan, self.chains, directions, 1e-3)

    def plain_pair(self) -> Any:
        """What inference of as many chains costs: both signs of the rollout, without perturbations."""
        both = {name: torch.cat([value, value]) for name, value in self.chains.conditioning.items()}
        start = torch.cat([self.chains.x_start] * 2)
        chains = Chains(start, torch.cat([self.chains.noise] * 2, dim=1), both, self.chains.objective)
        with torch.no_grad():
            return self.chains.objective(self._sample(chains).latents[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=STEPS, default="sd14")
    parser.add_argument("--batch", type=int, default=1, help="chains at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.size, device, options.batch)
    total = bench.steps
    parts: dict[str, Callable[[], Any]] = {
        **{f"half order, h = {h}": lambda h=h: bench.half_order(h) for h in (1, 2, 3, 4)},
        "first order, K = 1": lambda: bench.first_order(1, False),
        "first order, K = 3": lambda: bench.first_order(3, False),
        "first order, K = 1, checkpointed": lambda: bench.first_order(1, True),
        "first order, K = 3, checkpointed": lambda: bench.first_order(3, True),
        f"first order, K = {total}, checkpointed": lambda: bench.first_order(total, True),
        "perturbation rollout (one pair a chain)": bench.rollout,
        "plain sampling of as many chains": bench.plain_pair,
    }
    rows = {}
    for name, part in parts.items():
        rows[name] = bench.measure(part, options.repeats)
        print(f"{name:40s} {rows[name]['seconds']:8.3f} s  {rows[name]['peak_gib']:7.2f} GiB", flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    facts = {"machine": machine, "torch": torch.__version__, "size": options.size, "batch": options.batch}
    facts |= {"steps": total, "trained_numbers": len(bench.theta)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
