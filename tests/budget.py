"""The suite's two tiers, and the CPU seconds that they may take: `python -m tests.budget test | test-all`.

Prints at the end the user and system seconds of every process that a part started, workers of xdist and Ray included.
Over budget is a warning, and a failure where STRICT_BUDGET is set: the seconds of a shared machine differ by half.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

BUDGETS = {"test": 600, "test-all": 1500}  # CPU seconds
PYTEST = ["pytest", "-q", "-m"]
PARALLEL = ["--numprocesses", "2", "--dist", "loadfile"]
TICKS = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36


def parts(tier: str) -> dict[str, list[str]]:
    """Python's arguments for each part of a tier."""
    rest = "not gpu and not system" + (" and not slow" if tier == "test" else "")
    tests = {
        "without Ray": [*PYTEST, f"not ray and {rest}", *PARALLEL],
        "on Ray": [*PYTEST, f"ray and {rest}"],
    }
    return tests if tier == "test" else tests | {"of ten planted faults": ["tests.mutations.run", "--sample", "10"]}


def descendants() -> dict[tuple[str, str], float]:
    """CPU seconds of each process below this one, by its id and start."""
    parents, seconds = dict[int, int](), dict[int, tuple[tuple[str, str], float]]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()  # from the third on: see man proc
        except OSError:  # it has just ended
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        seconds[pid] = (stat.parent.name, fields[19]), (int(fields[11]) + int(fields[12])) / TICKS
    below = dict[tuple[str, str], float]()
    for pid, (key, spent) in seconds.items():
        parent = parents[pid]
        while parent in parents and parent != os.getpid():
            parent = parents[parent]
        if parent == os.getpid():
            below[key] = spent
    return below


def become_subreaper() -> None:
    """Let orphans, which daemons of Ray are, stay below this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_part(arguments: list[str]) -> tuple[int, float]:
    """Exit code and CPU seconds.

    Two counts, of which the larger holds: the kernel's of all that was waited for, and a sum over what /proc showed
    four times a second, since Ray's raylet waits for none of its workers.
    """
    before, seen = resource.getrusage(resource.RUSAGE_CHILDREN), dict[tuple[str, str], float]()
    part = subprocess.Popen([sys.executable, "-m", *arguments], env={"OMP_NUM_THREADS": "1"} | os.environ)
    while part.poll() is None:
        seen.update(descendants())
        time.sleep(0.25)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass  # what a part leaves behind becomes its subreaper's, this process's
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited_for = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return part.returncode, max(waited_for, sum(seen.values()))


def main(tier: str) -> int:
    become_subreaper()
    done = {name: run_part(arguments) for name, arguments in parts(tier).items()}
    spent = sum(seconds for _, seconds in done.values())
    each = ", ".join(f"{seconds:.0f} {name}" for name, (_, seconds) in done.items())
    print(f"{tier}: {spent:.0f} CPU s of {BUDGETS[tier]} ({each})")
    failed = [name for name, (code, _) in done.items() if code]
    if failed:
        print(f"{tier}: FAILED: {', '.join(failed)}")
    over = spent > BUDGETS[tier]
    if over:
        print(f"{tier}: over its budget of CPU seconds; make tests cheaper, or move what is rare to `slow` or `system`")
    return int(bool(failed) or (over and "STRICT_BUDGET" in os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
