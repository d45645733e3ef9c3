"""Kill -9 at random moments: an actor, a training worker, the driver, everything; ten trials of each.

A moment is any of the run's, its start included; in some more trials it comes after a random checkpoint.

    python -m bench.runs.chaos            # resumable: a finished trial is not run again
    python -m bench.runs.chaos --plan "forward term" --trials 2 --checkpointed 0

A shortened job of the embedded model (12 updates of all orders or 48 of the forward term, a checkpoint every 2) on Ray,
with 2 rollout actors, which run pairs beside chains, or nothing but chains. After the kill
the same command is given again if it ended (`--resume-or-start`), as a supervisor would. Results are appended to
bench/results/chaos.jsonl; the table is printed. Exits 1 if a trial ended with other weights, or if updates were lost
that a checkpoint held.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common import RESULTS, append_row, options, read_rows, table
from tests.system.chaos.killing import KINDS, PLANS, Kind, Run, Trial, lost, planned, trial

Rows = list[dict[str, Any]]
FILE = RESULTS / "chaos.jsonl"
CHECKPOINTED_SPAN_S = 3.0
HEADS = (
    "plan",
    "killed",
    "when",
    "trials",
    "the same weights",
    "most updates of a checkpoint lost",
    "starts of the command after the kill, mean",
)


def keep(row: dict[str, Any]) -> None:
    append_row(FILE, row)
    print(row, flush=True)


def reference(plan: str) -> dict[str, Any]:
    """An undisturbed run: its weights, and how long each kind of process lives."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), planned(Path(folder), plan))
        run.start()
        began = dict[str, float]()
        for kind in ("driver", "actor", "worker"):
            run.wait_for(kind)
            began[kind] = time.monotonic()
        run.finish()
        spans = {kind: time.monotonic() - moment for kind, moment in began.items()}
        return {"kind": "none", "plan": plan, "spans": spans, "theta_sha256": run.summary()["theta_sha256"]}


def undisturbed(rows: Rows) -> dict[str, dict[str, Any]]:
    """The rows of undisturbed runs, by plan."""
    return {row["plan"]: row for row in rows if row["kind"] == "none"}


def same(rows: Rows, row: dict[str, Any]) -> bool:
    """Whether a trial ended with the weights of its plan's undisturbed run."""
    return bool(row["theta_sha256"] == undisturbed(rows)[row["plan"]]["theta_sha256"])


def chaos_table(rows: Rows) -> str:
    lines = []
    for plan, kind, checkpointed in itertools.product(PLANS, KINDS, (False, True)):
        alike = {"plan": plan, "kind": kind, "checkpointed": checkpointed}
        trials = [row for row in rows if alike.items() <= row.items()]
        if trials:
            when = "after a checkpoint" if checkpointed else "any time"
            starts = sum(row["starts"] for row in trials) / len(trials)
            most = max(lost(trial_of(row)) for row in trials)
            count = sum(same(rows, row) for row in trials)
            lines.append([plan, kind, when, str(len(trials)), str(count), str(most), f"{starts:.1f}"])
    return table(HEADS, lines)


def trial_of(row: dict[str, Any]) -> Trial:
    return Trial(**{name: value for name, value in row.items() if name != "plan"})


def run_trials(plan: str, kinds: list[Kind], trials: int, *, checkpointed: bool) -> None:
    if plan not in undisturbed(read_rows(FILE)):
        keep(reference(plan))
    spans = undisturbed(read_rows(FILE))[plan]["spans"]
    for seed in range(3 * trials):  # a kill that comes too late does not count
        for kind in kinds:
            alike = {"plan": plan, "kind": kind, "checkpointed": checkpointed}
            done = [row["seed"] for row in read_rows(FILE) if alike.items() <= row.items()]
            if seed in done or len(done) >= trials:
                continue
            span = CHECKPOINTED_SPAN_S if checkpointed else spans.get(kind, spans["driver"])
            with tempfile.TemporaryDirectory() as folder:
                came = trial(Path(folder), kind, seed, span, checkpointed=checkpointed, plan=plan)
            if came is None:
                print(f"{kind} {seed}: the run was over before the kill", flush=True)
            else:
                keep({"plan": plan} | asdict(came))


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--trials", type=int, default=10, help="of each kind")
    parser.add_argument("--checkpointed", type=int, default=3, help="of each kind, after a checkpoint")
    parser.add_argument("--plan", choices=PLANS, default="all orders")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    run_trials(args.plan, args.kinds, args.checkpointed, checkpointed=True)
    run_trials(args.plan, args.kinds, args.trials, checkpointed=False)
    rows = read_rows(FILE)
    print(chaos_table(rows))
    trials = [row for row in rows if row["kind"] != "none"]
    return int(any(not same(rows, row) or lost(trial_of(row)) > 0 for row in trials))


if __name__ == "__main__":
    sys.exit(main())
