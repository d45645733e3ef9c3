"""Kill -9 at random moments: an actor, a training worker, the driver, everything; ten trials of each.

A moment is any of the run's, its start included; in some more trials it comes after a random checkpoint.

    python -m bench.runs.chaos            # resumable: a finished trial is not run again

A shortened job of the embedded model (12 updates, a checkpoint every 2) on Ray, with 2 rollout actors. After the kill
the same command is given again if it ended (`--resume-or-start`), as a supervisor would. Results are appended to
bench/results/chaos.jsonl; the table is printed. Exits 1 if a trial ended with other weights, or if updates were lost
that a checkpoint held.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common import RESULTS, append_row, options, read_rows, table
from tests.system.chaos.killing import KINDS, Kind, Run, Trial, chaos_recipe, lost, trial

FILE = RESULTS / "chaos.jsonl"
CHECKPOINTED_SPAN_S = 3.0
HEADS = (
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


def reference() -> dict[str, Any]:
    """An undisturbed run: its weights, and how long each kind of process lives."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), chaos_recipe(Path(folder)))
        run.start()
        began = dict[str, float]()
        for kind in ("driver", "actor", "worker"):
            run.wait_for(kind)
            began[kind] = time.monotonic()
        run.finish()
        spans = {kind: time.monotonic() - moment for kind, moment in began.items()}
        return {"kind": "none", "spans": spans, "theta_sha256": run.summary()["theta_sha256"]}


def chaos_table(rows: list[dict[str, Any]]) -> str:
    sha = next(row["theta_sha256"] for row in rows if row["kind"] == "none")
    lines = []
    for kind in KINDS:
        for checkpointed, when in ((False, "any time"), (True, "after a checkpoint")):
            trials = [row for row in rows if row["kind"] == kind and row["checkpointed"] == checkpointed]
            if trials:
                same = sum(row["theta_sha256"] == sha for row in trials)
                starts = sum(row["starts"] for row in trials) / len(trials)
                most = max(lost(Trial(**row)) for row in trials)
                lines.append([kind, when, str(len(trials)), str(same), str(most), f"{starts:.1f}"])
    return table(HEADS, lines)


def run_trials(kinds: list[Kind], trials: int, *, checkpointed: bool) -> None:
    rows = read_rows(FILE)
    if not rows:
        keep(reference())
        rows = read_rows(FILE)
    spans = rows[0]["spans"]
    for seed in range(3 * trials):  # a kill that comes too late does not count
        for kind in kinds:
            alike = {"kind": kind, "checkpointed": checkpointed}
            done = [row["seed"] for row in read_rows(FILE) if alike.items() <= row.items()]
            if seed in done or len(done) >= trials:
                continue
            span = CHECKPOINTED_SPAN_S if checkpointed else spans.get(kind, spans["driver"])
            with tempfile.TemporaryDirectory() as folder:
                came = trial(Path(folder), kind, seed, span, checkpointed=checkpointed)
            if came is None:
                print(f"{kind} {seed}: the run was over before the kill", flush=True)
            else:
                keep(asdict(came))


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--trials", type=int, default=10, help="of each kind")
    parser.add_argument("--checkpointed", type=int, default=3, help="of each kind, after a checkpoint")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    run_trials(args.kinds, args.checkpointed, checkpointed=True)
    run_trials(args.kinds, args.trials, checkpointed=False)
    rows = read_rows(FILE)
    print(chaos_table(rows))
    sha, trials = rows[0]["theta_sha256"], [row for row in rows if row["kind"] != "none"]
    return int(any(row["theta_sha256"] != sha or lost(Trial(**row)) > 0 for row in trials))


if __name__ == "__main__":
    sys.exit(main())
