"""`make demo`'s command, start to finish, in another checkout and in this one, in turn.

    git worktree add ../before REVISION
    python bench/demo_pair.py --other ../before    # two turns, about a quarter of an hour; bench/results/demo_pair.json

Both with this environment's packages, on Ray.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo import demo  # beside this file, as the next
from measuring import machine
from page import RESULTS
from regress import revision
from whole_runs import ROOT

FILE = RESULTS / "demo_pair.json"


def run(checkout: Path) -> dict[str, Any]:
    return demo(checkout=checkout) | {"load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of the revision to compare with")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    checkouts = {"before": given.other.resolve(), "now": ROOT}
    facts: dict[str, Any] = {"machine": machine(), "date": datetime.now(UTC).date().isoformat()}
    facts |= {"revisions": {name: revision(checkout) for name, checkout in checkouts.items()}}
    turns: list[dict[str, Any]] = []
    for _ in range(given.turns):
        turns.append({name: run(checkout) for name, checkout in checkouts.items()})
        print(json.dumps(turns[-1]), flush=True)
        FILE.write_text(json.dumps(facts | {"turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
