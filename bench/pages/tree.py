"""The package's files, each by the first line of its docstring, for docs/architecture.md."""

from __future__ import annotations

import ast

from bench.common import ROOT
from tests.test_floors import FLOORS


def tree() -> str:
    """Floor by floor, the lowest first."""
    lines = []
    for number, rooms in enumerate(FLOORS, 1):
        lines.append(f"{number}")
        for room in sorted(rooms):
            place = ROOT / "rlr_ray" / room
            files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
            for file in files:
                words = ast.get_docstring(ast.parse(file.read_text("utf-8")))
                if words:
                    name = str(file.relative_to(ROOT / "rlr_ray")).removesuffix("__init__.py")
                    lines.append(f"  {name:36} {words.splitlines()[0]}")
    return "\n".join(["```", *lines, "```"])
