"""Files shipped inside the package."""

from pathlib import Path

DIGITS = Path(__file__).parent / "digits"  # built by scripts/build_digits.py
PROMPTS = Path(__file__).parent / "prompts"  # lists of our own, one prompt a line
MOVING_DIGITS = Path(__file__).parent / "moving_digits"  # built by scripts/build_moving_digits.py
