"""`make demo`'s job in one process on this machine's device, or its command in another checkout and here, in turn.

    python -m bench.speed.demo
    git worktree add ../before REVISION
    python -m bench.speed.demo --other ../before    # two turns, about a quarter of an hour; results/demo_pair.json

Both checkouts with this environment's packages.
"""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.common import RESULTS, ROOT, Row, revision, write_json
from bench.models import DEVICE
from bench.runs.sweep import train
from bench.speed.measuring import Kept, arguments, machine, rounded

KEPT = ("steps", "reward_before", "reward_after", "gain", "gain_se", "seconds")


def demo(*overrides: str, checkout: Path = ROOT) -> Row:
    """Seconds of the command from start to finish, and what the run's summary says."""
    began = time.monotonic()
    summary, _ = train("configs/digits.yaml", overrides, checkout)
    return {"start_to_finish": rounded(time.monotonic() - began)} | {name: summary[name] for name in KEPT}


def in_turn(other: Path, count: int) -> None:
    checkouts = {"before": other.resolve(), "now": ROOT}
    facts: Row = {"machine": machine(), "date": datetime.now(UTC).date().isoformat()}
    facts |= {"revisions": {name: revision(checkout) for name, checkout in checkouts.items()}, "turns": []}
    for _ in range(count):
        turn = {name: demo(checkout=path) | {"load": os.getloadavg()[0]} for name, path in checkouts.items()}
        facts["turns"].append(turn)
        print(json.dumps(turn), flush=True)
        write_json(RESULTS / "demo_pair.json", facts)


def main() -> None:
    args = arguments(__doc__, other="", turns=2)
    if args.other:
        in_turn(Path(args.other), args.turns)
        return
    kept = Kept("demo", "digits", {}, args.limit_s)
    kept.row("demo", lambda: demo("cluster=none", f"device={DEVICE.type}"))


if __name__ == "__main__":
    main()
