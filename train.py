"""Train from a recipe: `ray submit cluster.yaml train.py -- --config configs/digits.yaml`, or run it yourself."""

import sys

from rlr_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
