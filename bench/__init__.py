"""Measured runs (runs), speed and memory (speed), TRL trainers beside ours (peers), and pages of it all (pages)."""
