"""Seconds, peak memory and arithmetic of one update's parts, and of whole updates, at batch 1.

    python -m bench.speed.update_parts --size sd14       # on a GPU; sdxl likewise
    python -m bench.speed.update_parts --size tiny_sd    # on a CPU: that the script works

No Ray, no network. Parts: half order on sub-chains of h = 1 .. 4 steps, first order on the last K steps, the forward
term, a rollout of one pair, plain sampling of as many chains. "Checkpointed" is `estimator.checkpoint_steps`, "by
blocks" is `model.gradient_checkpointing`. Updates: sampling, first order, half order in the middle, and a pair for the
other steps; or sampling and the forward term. Memory is the peak beyond what the idle model holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.models import engine
from bench.speed.measuring import Kept, Part, arguments, facts_of, measure
from rlr_ray.core.first_order import first_order
from rlr_ray.core.forward_term import forward_draws, forward_term
from rlr_ray.core.half_order import half_order
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Trajectory
from rlr_ray.core.zeroth_order import rollout
from rlr_ray.models.seams import recomputed

FORWARD = "forward term, {} draws"
HALF = "half order, h = {}"
ROLLOUT = "rollout of one pair a chain"
UPDATE = "update: K = {}, h = {}, a pair"


class Parts:
    """One model and one batch of chains, as an update has them."""

    def __init__(self, size: str, batch: int):
        self.engine = engine(size)
        self.model: Any = self.engine.model
        self.theta, self.steps = self.model.initial_theta, len(self.model.schedule)
        self.chains = self.engine.train_chains(0, range(batch))
        self.whole = self.sample(self.chains)

    def sample(self, chains: Chains, stop: int | None = None) -> Trajectory:
        return self.engine.sampler.sample(self.theta, *chains.start, stop=stop)

    def first_order(self, count: int, checkpointed: bool = False, head: Trajectory | None = None) -> Trajectory:
        """On the last `count` steps; the whole chain."""
        if head is None:
            latents = self.whole.latents[: self.steps - count + 1]
            head = Trajectory(latents, self.whole.noise, self.whole.conditioning)
        arguments = (self.engine.sampler, self.theta, head, self.chains.objective)
        return first_order(*arguments, checkpoint_steps=checkpointed)[2]

    def middle(self, length: int) -> range:
        start = (self.steps - length) // 2
        return range(start, start + length)

    def half_order(self, length: int, whole: Trajectory | None = None) -> Tensor:
        advantage = torch.ones(len(self.chains.x_start), device=self.engine.device)
        arguments = (self.engine.sampler, self.theta, whole or self.whole)
        return half_order(*arguments, self.middle(length), advantage)

    def forward_term(self, draws: int) -> Tensor:
        """Of draws over all steps of the chain, each with noises of its own."""
        size, steps = len(self.chains.x_start), range(self.steps)
        drawn, noise = forward_draws(steps, draws, self.model.latent_shape, [[k] for k in range(size)])
        latents, device = self.whole.latents[-1], self.engine.device
        advantage = torch.ones(size, device=device)
        told = (latents, self.whole.conditioning, advantage, drawn.to(device), noise.to(device))
        return forward_term(self.engine.sampler, self.theta, *told)

    def rollout(self, count: int = 0, length: int = 0) -> tuple[Tensor, Tensor]:
        """A pair a chain, perturbed where neither first nor half order is."""
        free = tuple(k for k in range(self.steps - count) if k not in self.middle(length))
        plan = Plan(self.steps, range(self.steps - count, self.steps), (), free)
        directions = torch.randn(len(self.chains.x_start), len(self.theta), device=self.engine.device)
        return rollout(self.engine.sampler, self.theta, plan, self.chains, directions, 1e-3)

    def plain(self) -> Tensor:
        """Inference of as many chains as a rollout of a pair has."""
        both = {name: torch.cat([value, value]) for name, value in self.chains.conditioning.items()}
        start, noise = torch.cat([self.chains.x_start] * 2), torch.cat([self.chains.noise] * 2, dim=1)
        chains = Chains(start, noise, both, self.chains.objective)
        latents = self.sample(chains).latents[-1]
        with torch.no_grad():
            return torch.cat([self.chains.objective(sign) for sign in latents.chunk(2)])

    def update_forward(self, draws: int) -> Tensor:
        """An update of the forward term: chains are sampled and rated, then denoised."""
        with torch.no_grad():
            self.chains.objective(self.sample(self.chains).latents[-1])
        return self.forward_term(draws)

    def update(self, count: int, length: int, checkpointed: bool = False) -> None:
        head = self.sample(self.chains, stop=self.steps - count)
        whole = self.first_order(count, checkpointed, head)
        if length:
            self.half_order(length, whole)
        if count + length < self.steps:
            self.rollout(count, length)

    @contextmanager
    def by_blocks(self) -> Iterator[None]:
        """With `model.gradient_checkpointing`."""
        unet = self.model.pipeline.unet
        unet.enable_gradient_checkpointing(recomputed)
        yield
        unet.disable_gradient_checkpointing()


def parts_of(bench: Parts) -> dict[str, Part]:
    """Every row's work, what matters most first."""
    steps = bench.steps

    def by_blocks(part: Part) -> Part:
        def work() -> None:
            with bench.by_blocks():
                part()

        return work

    parts: dict[str, Part] = {HALF.format(h): lambda h=h: bench.half_order(h) for h in (1, 2, 3, 4)}  # type: ignore[misc]
    parts |= {ROLLOUT: bench.rollout, "plain sampling of as many chains": bench.plain}
    parts |= {FORWARD.format(n): lambda n=n: bench.forward_term(n) for n in (1, 4)}  # type: ignore[misc]
    parts |= {
        "update: " + FORWARD.format(4): lambda: bench.update_forward(4),
        UPDATE.format(1, 2): lambda: bench.update(1, 2),
        f"update: K = {steps}, checkpointed": lambda: bench.update(steps, 0, True),
        "first order, K = 1": lambda: bench.first_order(1),
        "first order, K = 3": lambda: bench.first_order(3),
        "first order, K = 3, checkpointed": lambda: bench.first_order(3, True),
        f"first order, K = {steps}, checkpointed": lambda: bench.first_order(steps, True),
        HALF.format("2, by blocks"): by_blocks(lambda: bench.half_order(2)),
        "first order, K = 3, checkpointed, by blocks": by_blocks(lambda: bench.first_order(3, True)),
        UPDATE.format(1, 1): lambda: bench.update(1, 1),
        UPDATE.format(1, 4): lambda: bench.update(1, 4),
        UPDATE.format(3, 2): lambda: bench.update(3, 2),
        UPDATE.format(3, 2) + ", checkpointed": lambda: bench.update(3, 2, True),
        UPDATE.format(1, 2) + ", by blocks": by_blocks(lambda: bench.update(1, 2)),
        f"update: K = {steps}, checkpointed, by blocks": by_blocks(lambda: bench.update(steps, 0, True)),
    }
    return parts


def main() -> None:
    args = arguments(__doc__, batch=1)
    bench = Parts(args.size, args.batch)
    kept = Kept("update_parts", args.size, facts_of(bench.engine) | {"batch": args.batch}, args.limit_s)
    for name, part in parts_of(bench).items():
        kept.row(name, lambda part=part: measure(part))  # type: ignore[misc]


if __name__ == "__main__":
    main()
