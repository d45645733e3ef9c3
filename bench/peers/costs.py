"""Seconds and peak memory of an update of TRL's trainers and of our plans, 20 chains at once.

    nice python -m bench.peers.costs --python ENV/bin/python    # ENV as for peers/runs.py; peers_costs.json

CPU seconds of one thread in the quickest update after the first, since other work on a machine only slows; the peak is
what tensors took in one more update beyond what was held before it, by the same meter on both sides
(rlr_ray/utils/memory.py).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import RESULTS, options, write_json
from bench.peers.runs import LEARNING_RATES, PEERS, Trl, engine_of, spec_of, train_here
from bench.peers.runs import OURS as PLANS
from bench.runs.sweep import load_sweep

FILE = RESULTS / "peers_costs.json"
VARIANTS = load_sweep("ablation").variants
CHUNK = 20  # chains at once
MEASURED = 12_000  # denoiser forwards, a backward as two, the first update among them
EVERY_UPDATE = list(range(1, MEASURED, 100))
OURS = {
    "full backprop": VARIANTS["full backprop"],
    "planner's choice, FO(4) + REINFORCE": VARIANTS["planner's choice, FO(4) + REINFORCE"],
    "FO + HO + ZO (rlr)": ["estimator.zeroth_order.chunk_size=20"],
    "DDPO (REINFORCE)": VARIANTS["DDPO (REINFORCE)"],
    "ddpo without the last step": PLANS["ddpo without the last step"],
    "surrogate alone": ["estimator={preset: surrogate, rest: none}", "reward.differentiable=false"],
}


def ours(overrides: Sequence[str]) -> dict[str, Any]:
    keys = [f"train.chunk_size={CHUNK}", "train.sampling_size=null", *overrides]
    return train_here(engine_of(0, *keys), EVERY_UPDATE, traced=True)


def theirs(trl: Trl, name: str) -> dict[str, Any]:
    peer = replace(PEERS[name], chunk_size=CHUNK)
    return trl.ask(spec_of(peer, engine_of(0), LEARNING_RATES[0], EVERY_UPDATE, traced=True))


def costs(results: dict[str, Any]) -> dict[str, float]:
    return {"seconds_per_1000": quickest(results["points"]), "peak_mib": results["peak_bytes"] / 2**20}


def quickest(points: Sequence[dict[str, Any]]) -> float:
    """Seconds per 1,000 forwards; of points one an update."""
    pairs = itertools.pairwise(points)
    return min(
        1000 * (after["seconds"] - before["seconds"]) / (after["cost"] - before["cost"]) for before, after in pairs
    )


def alike(trl: Trl, name: str) -> dict[str, Any]:
    """How far the same updates take a trainer as shipped from where they take it repaired, and at what cost.

    As shipped it runs with both of guidance's passes at a scale of nearly 1.
    """
    peer, engine = PEERS[name], engine_of(0)
    repaired = trl.ask(spec_of(peer, engine, LEARNING_RATES[0], [MEASURED]))
    shipped = trl.ask(spec_of(replace(peer, repaired=False), engine, LEARNING_RATES[0], [2 * MEASURED]))
    ends = repaired["points"][-1], shipped["points"][-1]
    thetas = [end["theta"] for end in ends]
    apart = float((thetas[1] - thetas[0]).norm() / (thetas[0] - engine.model.initial_theta).norm())
    updates = [end["updates"] for end in ends]
    return {"apart": apart, "cost_ratio": ends[1]["cost"] / ends[0]["cost"], "updates": updates}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--python", required=True, help="of the environment of bench/peers/requirements.txt")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        trl = Trl(args.python, Path(folder))
        for plan, peer in zip(OURS, PEERS, strict=True):  # in turn, so that a busy machine slows both
            results |= {plan: costs(ours(OURS[plan])), peer: costs(theirs(trl, peer))}
        same = alike(trl, "AlignProp, all steps")
    write_json(FILE, {"costs": results, "alike": same})


if __name__ == "__main__":
    main()
