"""Files shipped inside the package."""

from pathlib import Path

DIGITS = Path(__file__).parent / "digits"  # built by scripts/build_digits.py
