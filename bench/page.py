"""What the pages of figures share: where the data lies, and Markdown tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = RESULTS.parent.parent / "docs"
IMAGES = DOCS / "images"
MACHINE = "two x86-64 cores, one thread a process"


def read_json(name: str) -> Any:
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_se(values: Sequence[float]) -> str:
    """Mean over seeds and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
