"""Chains a second of perturbation rollouts, against inference of as many without perturbations.

    python -m bench.speed.throughput --size digits       # or tiny_sd, tiny_sdxl; on a GPU also sd14, sdxl

n directions are n pairs, so 2n rows in a batch, each with adapter weights of its own. Compared in turn, in one process:

- the chain alone: `core.zeroth_order.rollout`, this package's chain at one theta, and diffusers' pipeline, which is
  given embeddings and latents and returns latents;
- a whole rollout as an actor runs it, `RolloutRequest.run`: directions and noises drawn, pictures decoded and rated;
  against this package's chains at one theta, decoded and rated, and diffusers' pipeline with decoded, rated pictures.

The pipeline runs the same steps of DDIM with the same adapter loaded and the same guidance. At true sizes 10 steps are
taken: a step's cost does not depend on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.models import TRUE_SIZES, engine
from bench.speed.measuring import Kept, Part, arguments, facts_of, interleaved, rounded
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains
from rlr_ray.core.zeroth_order import Directions, rollout
from rlr_ray.models.schedulers import ddim_scheduler
from rlr_ray.train.engine import Engine, RolloutRequest

DIRECTIONS = (1, 8, 32)
ROLLOUT, CHAIN, PIPELINE = "rollout", "chain", "pipeline"


class Bench:
    """One engine, and the ways to run 2n chains of it."""

    def __init__(self, size: str, **changes: Any):
        steps = {"sampler": {"steps": 10}} if size in TRUE_SIZES else {}
        self.engine: Engine = engine(size, **steps, **changes)
        self.model: Any = self.engine.model
        self.theta = self.model.initial_theta
        self.plan = PlanShape(len(self.model.schedule), 0, 0).draw(0)  # all steps are perturbed
        self.pipeline: Any = self.engine.model.pipeline  # type: ignore[attr-defined]
        self.pipeline.set_progress_bar_config(disable=True)
        sampler = self.engine.config.sampler
        self.pipeline.scheduler = ddim_scheduler(self.pipeline.scheduler.config, sampler.timestep_spacing)
        if self.engine.config.model.decode_slice:
            self.pipeline.vae.enable_slicing()

    def chain_alone(self, count: int) -> dict[str, Part]:
        """A rollout of `count` pairs from what is on the device already, and inference of its rows."""
        chains = self.engine.train_chains(0, range(count))
        bare = Chains(chains.x_start, chains.noise, chains.conditioning, lambda latent: latent.flatten(1).sum(1))
        directions = torch.randn(count, len(self.theta), device=self.engine.device)
        both = self.engine.train_chains(0, range(2 * count))
        return {
            ROLLOUT: lambda: rollout(self.engine.sampler, self.theta, self.plan, bare, directions, 1e-3),
            CHAIN: lambda: self._sample(both),
            PIPELINE: lambda: self._pipeline(both.x_start, self._texts(2 * count), "latent"),
        }

    def whole(self, count: int) -> dict[str, Part]:
        """A rollout of `count` pairs as an actor runs it, and inference of its rows, rated likewise."""
        request = RolloutRequest(0, self.plan, self.theta.cpu(), Directions(len(self.theta), 1e-3))

        def chain() -> Tensor:
            chains = self.engine.train_chains(0, range(2 * count))
            with torch.no_grad():
                return chains.objective(self._sample(chains))

        def pipeline() -> Tensor:
            texts = self._texts(2 * count)
            start = torch.randn(2 * count, *self.model.latent_shape, device=self.engine.device)
            images = self._pipeline(start, texts, "pt")
            return self.engine.rewards.score(images.float(), texts, [{}] * len(texts)).scores

        return {ROLLOUT: lambda: request.run(self.engine, range(count)), CHAIN: chain, PIPELINE: pipeline}

    def _sample(self, chains: Chains) -> Tensor:
        return self.engine.sampler.sample(self.theta, *chains.start).latents[-1]

    def _texts(self, count: int) -> list[str]:
        return [self.engine.prompts[k % len(self.engine.prompts)].text for k in range(count)]

    def _pipeline(self, start: Tensor, texts: list[str], output: str) -> Tensor:
        sampler = self.engine.config.sampler
        images: Tensor = self.pipeline(
            texts,
            latents=start.to(self.pipeline.unet.dtype),
            num_inference_steps=sampler.steps,
            eta=sampler.eta,
            guidance_scale=sampler.guidance_scale,
            output_type=output,
        ).images
        return images

    def row(self, parts: dict[str, Part], turns: int) -> dict[str, Any]:
        """Seconds in every turn, and the arithmetic of plain inference."""
        with FlopCounterMode(display=False) as counter:
            parts[CHAIN]()
        return {"tflop": rounded(counter.get_total_flops() / 1e12), "seconds": interleaved(parts, turns)}


def main() -> None:
    args = arguments(__doc__, turns=5)
    bench = Bench(args.size)
    kept = Kept("throughput", args.size, facts_of(bench.engine), args.limit_s)
    for kind, parts_of in (("chain alone", bench.chain_alone), ("whole", bench.whole)):
        for count in DIRECTIONS:
            kept.row(f"{kind}, {count}", lambda: bench.row(parts_of(count), args.turns))  # noqa: B023


if __name__ == "__main__":
    main()
