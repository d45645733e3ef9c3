"""What all benches share: where results lie, how they are read and kept, Markdown tables. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_ray.utils.environment import prepare_process

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
MACHINE = "two x86-64 cores, one thread a process"
Row = dict[str, Any]


def read_json(name: str) -> Any:
    """A result by its file's name; None if it is not measured."""
    file = RESULTS / name
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def read_rows(file: Path) -> list[Row]:
    """Rows of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def options(doc: str | None) -> argparse.ArgumentParser:
    """A bench's parser, whose help is the module's docstring. Its process computes with one thread."""
    prepare_process(1)
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def revision(checkout: Path = ROOT) -> str:
    """The git revision; `-dirty` if files have changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip() or "unknown"


def text(name: str) -> str:
    """A part of bench/pages/texts.md, with names in braces where figures go."""
    pages = (ROOT / "bench" / "pages" / "texts.md").read_text("utf-8")
    _, marker, rest = pages.partition(f"<!-- {name} -->\n")
    assert marker, name
    return rest.partition("<!-- ")[0]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_se(values: Sequence[float], digits: int = 2) -> str:
    """Mean over seeds and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {standard_error(values):.{digits}f}"


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
