"""`python -m rlr_ray` is the command `rlr-ray`."""

from __future__ import annotations

import sys


def main() -> int:
    """The command; who interrupts it while its parts are imported sees no traceback."""
    try:
        from rlr_ray.cli import main as command  # only here: it may be interrupted
    except KeyboardInterrupt:
        print("interrupted; nothing was begun", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
