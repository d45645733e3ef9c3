"""`python -m rlr_ray` is the command `rlr-ray`."""

import sys

from rlr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
