"""Loggers, reports and pictures: a run's updates for people and for programs."""

from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]  # is given every update's row
