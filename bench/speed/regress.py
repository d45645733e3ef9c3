"""A quick look at speed, to run before and after a change: each figure beside those that were kept last.

    python -m bench.speed.regress          # within three minutes on two idle cores
    python -m bench.speed.regress --keep   # the same, kept as a row of bench/results/regress.jsonl

Ratios are of what was measured in turn in this run, so they depend little on the machine; seconds do. Lower is better,
except for rollout / inference, which is of throughput.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from bench.common import RESULTS, ROOT, append_row, options, read_rows, revision
from bench.speed import overlap, scale, throughput
from bench.speed.measuring import interleaved, machine, median_ratio, rounded, seconds

KEPT = RESULTS / "regress.jsonl"
PAIRS = 8


def rollouts() -> dict[str, float]:
    """Chains a second of rollouts of 8 pairs, over those of diffusers' pipeline with as many rows."""
    bench = throughput.Bench("digits")
    alone, whole = (interleaved(parts(PAIRS), 5) for parts in (bench.chain_alone, bench.whole))
    ratios = {"chain": median_ratio(alone[throughput.PIPELINE], alone[throughput.ROLLOUT])}
    ratios["whole"] = median_ratio(whole[throughput.PIPELINE], whole[throughput.ROLLOUT])
    return {f"rollout / inference, {name}": ratio for name, ratio in ratios.items()}


def step() -> dict[str, float]:
    """A small update in two processes, over the longer of its halves."""
    small = {"train": {"chains": 40}, "estimator": {"zeroth_order": {"count": 40, "chunk_size": 20}}}
    bench = overlap.Bench("digits", **small)
    turns = bench.turns(3, budget_s=30)
    bench.other.end()
    longer = overlap.longer_halves(turns)
    return {f"step / longer half {where}": median_ratio(turns["step"], longer[where]) for where in longer}


def dispatcher() -> dict[str, float]:
    """64 simulated actors with four chunks of a second each, over the best schedule."""
    row = scale.simulate([scale.InProcess()], 64, 4, spread=False, hedge=False, rollout_s=1.0)
    return {"dispatcher / best schedule": row["seconds"] / row["ideal"]}


def children() -> float:
    """CPU seconds of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def imports() -> dict[str, float]:
    """The command line's imports, over those of torch and diffusers alone."""

    def of(names: str) -> Callable[[], None]:
        return lambda: _run("-c", f"import {names}")

    parts = {"bare": of("torch, diffusers"), "own": of("rlr_ray.cli")}
    taken = interleaved(parts, 2, clock=children)
    ratio = median_ratio(taken["own"], taken["bare"])
    return {"import / torch and diffusers": ratio, "import, CPU s": min(taken["own"])}


def start_up() -> dict[str, float]:
    """From the command to the end of a run of one update, with next to no evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["cluster=none", "train.iterations=1", "evaluation.chains=2", f"output_dir={folder}"]
        words = [word for key in keys for word in ("--set", key)]
        taken = seconds(lambda: _run("-m", "rlr_ray", "train", "--config", "configs/digits.yaml", *words), children)
        return {"start-up and one update, CPU s": taken}


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def shown(now: dict[str, Any], last: dict[str, Any] | None) -> str:
    """A line a figure: now, last, and the change."""
    kept = last["figures"] if last else {}
    of = f"{last['revision']}, {last['date']}" if last else "none kept"
    lines = [f"{'':32s}{'now':>9s}{'last':>9s}{'change':>9s}   last: {of}"]
    for name, value in now["figures"].items():
        before = kept.get(name)
        compared = f"{before:9.3f}{value / before - 1:+9.1%}" if before else ""
        lines.append(f"{name:32s}{value:9.3f}{compared}")
    if last and last["machine"] != now["machine"]:
        lines.append(f"the last were measured on another machine: {last['machine']}")
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--keep", action="store_true", help="append the figures to the kept ones")
    args = parser.parse_args()
    began = time.monotonic()
    figures: dict[str, float] = {}
    for part in (imports, start_up, dispatcher, rollouts, step):
        figures |= {name: rounded(value) for name, value in part().items()}
        print(f"{part.__name__}: {time.monotonic() - began:.0f} s", flush=True)
    now: dict[str, Any] = {"revision": revision(), "date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    now |= {"figures": figures}
    print(shown(now, next(reversed(read_rows(KEPT)), None)))
    if args.keep:
        append_row(KEPT, now)


if __name__ == "__main__":
    main()
