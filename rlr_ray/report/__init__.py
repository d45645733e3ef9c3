"""A run's `report.html`: what was run, what came of it, and what to be careful about."""
