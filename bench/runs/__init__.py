"""Whole runs, measured: sweeps over recipes, directions, break-even, the planner and kills."""
