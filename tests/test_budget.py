"""The count of CPU seconds, of which the suite's budget is made."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

COUNT = "from tests.budget import *; become_subreaper(); print(*run_part(['tests.test_budget']))"
BURN = "import time\nwhile time.process_time() < 1: pass"


def test_a_process_that_no_one_waits_for_is_counted() -> None:
    """As Ray's are: this module's parent ignores the end of its children, so that the kernel forgets their seconds."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    code, seconds = done.stdout.split()
    assert code == "7" and 1.6 < float(seconds) < 3


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = [subprocess.Popen([sys.executable, "-c", BURN], start_new_session=True) for _ in range(2)]
    while any(child.poll() is None for child in children):
        time.sleep(0.01)
    sys.exit(7)
