"""Actors' rollouts as `cluster.rollouts` may have them: in another dtype or compiled, against those of the workers.

    python -m bench.speed.rollouts --size digits       # or tiny_sd, tiny_sdxl; on a GPU also sd14, sdxl

Eight pairs a batch, `Engine.rollout` whole: drawn, sampled, decoded, rated. Each way in turn with the workers', in one
process. Compiled is the last: minutes before its first call.
"""

from __future__ import annotations

from typing import Any

from bench.models import DEVICE
from bench.speed.measuring import Kept, arguments, facts_of, interleaved, median_ratio, rounded, seconds
from bench.speed.throughput import ROLLOUT, Bench

PAIRS = 8
LESS = "float16" if DEVICE.type == "cuda" else "bfloat16"  # CPUs have no quick kernels of float16
OTHERWISE: dict[str, dict[str, Any]] = {LESS: {"dtype": LESS}, "compiled": {"compile": True}}


def row(plain: Bench, changed: Bench, turns: int) -> dict[str, Any]:
    """Seconds of the changed way's first call, and of both in every turn; above 1: the change is faster."""
    ways = {"plain": plain.whole(PAIRS)[ROLLOUT], "changed": changed.whole(PAIRS)[ROLLOUT]}
    first = rounded(seconds(ways["changed"]))
    taken = interleaved(ways, turns)
    return {"first_call": first, "ratio": rounded(median_ratio(taken["plain"], taken["changed"])), "seconds": taken}


def main() -> None:
    args = arguments(__doc__, turns=5)
    plain = Bench(args.size)
    kept = Kept("rollouts", args.size, facts_of(plain.engine) | {"pairs": PAIRS}, args.limit_s)
    for name, keys in OTHERWISE.items():
        kept.row(name, lambda: row(plain, Bench(args.size, model=keys), args.turns))  # noqa: B023


if __name__ == "__main__":
    main()
