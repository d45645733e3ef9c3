"""What was tried to make a call of the denoiser cheaper: each against the call without it, in turns, in one process.

    python -m bench.speed.speedups                 # the embedded model; with sizes as the other benches of speed
    python -m bench.speed.speedups --compiled 1    # torch.compile too: minutes before its first call

A row's ratio is above 1 where the change is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.models import DEVICE, engine
from bench.speed.measuring import Kept, Part, arguments, facts_of, interleaved, median_ratio, rounded, seconds
from rlr_ray.core.first_order import first_order
from rlr_ray.train.engine import Engine

CHECK = "the same call twice (a check)"


def forward(one: Engine, chains: int, *, own: bool = False) -> Part:
    """A call without gradients, at one theta or at each chain's own."""
    model, some = one.model, one.train_chains(0, range(chains))
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(chains, len(model.initial_theta), generator=source).to(one.device)
    theta = model.initial_theta + 0.01 * noise if own else model.initial_theta

    def call() -> Tensor:
        with torch.no_grad():
            return model(theta, some.x_start, model.schedule.timesteps[1], some.conditioning)

    return call


def backpropagation(one: Engine, chains: int) -> Part:
    """First order through the last three steps, decoder and reward."""
    model, some = one.model, one.train_chains(0, range(chains))
    begun = one.sampler.sample(model.initial_theta, *some.start, stop=len(model.schedule) - 3)
    return lambda: first_order(one.sampler, model.initial_theta, begun, some.objective)


def rating(one: Engine, pairs: int, *, at_once: bool) -> Part:
    """Decoding and rating both signs of a pair's last latents, in one call or in two."""
    some = one.train_chains(0, range(pairs))
    latents = torch.cat([some.x_start, some.x_start])

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [some.objective(part) for part in ([latents] if at_once else latents.chunk(2))]

    return call


def without_onednn(call: Part) -> Part:
    def switched() -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return call()

    return switched


class Tried:
    """Pairs of calls by name: without a change, and with it."""

    def __init__(self, size: str):
        self.size, self.plain = size, engine(size)

    def changed(self, change: Callable[[Any], Any]) -> Engine:
        """An engine whose model is not as it comes."""
        one = engine(self.size)
        change(one.model)
        return one

    def quick(self) -> dict[str, tuple[Part, Part]]:
        plain = self.plain
        vmapped = self.changed(lambda model: setattr(model.tuned, "per_chain", False))
        last = self.changed(lambda model: model.pipeline.unet.to(memory_format=torch.channels_last))
        pairs = {CHECK: (forward(plain, 40), forward(plain, 40))}
        for chains in (16, 80):
            batched = forward(plain, chains, own=True)
            pairs |= {
                f"own weights of {chains} chains by a batched product, not vmap": (
                    forward(vmapped, chains, own=True),
                    batched,
                )
            }
        pairs |= {"one call for 80 chains, not four for 20": (repeated(forward(plain, 20), 4), forward(plain, 80))}
        pairs |= {
            "40 pairs decoded and rated in one call, not two": (
                rating(plain, 40, at_once=False),
                rating(plain, 40, at_once=True),
            )
        }
        for chains in (20, 80):
            pairs |= {f"channels last, a forward of {chains}": (forward(plain, chains), forward(last, chains))}
        pairs |= {"channels last, first order of 20": (backpropagation(plain, 20), backpropagation(last, 20))}
        if DEVICE.type == "cpu":
            pairs |= {"without oneDNN, a forward of 40": (forward(plain, 40), without_onednn(forward(plain, 40)))}
        return pairs

    def compiled(self) -> dict[str, tuple[Part, Part]]:
        plain, fast = self.plain, engine(self.size, model={"compile": True})
        return {
            "torch.compile, a forward of 40": (forward(plain, 40), forward(fast, 40)),
            "torch.compile, own weights of 40 chains": (forward(plain, 40, own=True), forward(fast, 40, own=True)),
        }


def repeated(call: Part, times: int) -> Part:
    return lambda: [call() for _ in range(times)]


def row(without: Part, with_it: Part, turns: int) -> dict[str, Any]:
    """Seconds of the change's first call, and of both in every turn."""
    first = rounded(seconds(with_it, time.perf_counter))  # with the compiler's processes
    taken = interleaved({"without": without, "with": with_it}, turns)
    return {"first_call": first, "ratio": rounded(median_ratio(taken["without"], taken["with"])), "seconds": taken}


def main() -> None:
    args = arguments(__doc__, turns=20, compiled=0)
    tried = Tried(args.size)
    kept = Kept("speedups", args.size, facts_of(tried.plain), args.limit_s)
    for name, pair in (tried.quick() | (tried.compiled() if args.compiled else {})).items():
        kept.row(name, lambda: row(*pair, args.turns))  # noqa: B023


if __name__ == "__main__":
    main()
