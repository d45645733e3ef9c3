"""Train from a recipe: `ray submit cluster.yaml train.py -- --config configs/digits.yaml`, or run it yourself.

Another command goes before its arguments: `ray submit cluster.yaml train.py -- tune --config tune_configs/digits.yaml`.
"""

import sys

from rlr_ray.cli import main

if __name__ == "__main__":
    command = [] if sys.argv[1:2] and not sys.argv[1].startswith("-") else ["train"]
    sys.exit(main([*command, *sys.argv[1:]]))
