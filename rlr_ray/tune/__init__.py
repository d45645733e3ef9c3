"""Search over a recipe's keys, for each of several memory budgets, with Ray Tune."""
