"""Search over a recipe's keys, for each of several memory budgets, with Ray Tune."""

from rlr_ray import cluster as cluster  # sets Ray's environment before Ray is imported
