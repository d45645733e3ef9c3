"""Imports point down, and nothing but rlr_ray.cluster and rlr_ray.tune needs Ray."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import rlr_ray

PACKAGE = Path(rlr_ray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Lowest first: a module may import from its own floor and from those above it in this list.
FLOORS = [
    {"errors", "assets"},
    {"core", "utils", "rewards"},
    {"config"},
    {"models", "prompts", "loggers"},
    {"train"},
    {"lab", "cluster", "evaluation"},
    {"tune"},
    {"cli", "__main__"},
]


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    return names_in(ast.walk(ast.parse(path.read_text("utf-8"))))


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import of {node.names[0].name}"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path: Path) -> str:
    return ".".join(("rlr_ray", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    own = {name.split(".")[1] for name in imports_of(path) if name.startswith("rlr_ray.")}
    assert all(floor(other) <= floor(part) for other in own), f"{part} imports {own}"


def test_no_room_of_a_floor_is_part_of_a_circle() -> None:
    """Rooms of one floor may know each other, one way only."""
    knows: dict[str, set[str]] = {}
    for path in FILES:
        own = {name.split(".")[1] for name in imports_of(path) if name.startswith("rlr_ray.")}
        knows.setdefault(part_of(path), set()).update(own - {part_of(path)})
    graphlib.TopologicalSorter(knows).prepare()  # raises CycleError


def test_nothing_lies_loose() -> None:
    files = {path.name for path in PACKAGE.glob("*") if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "errors.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_cluster_and_tune_import_ray(path: Path) -> None:
    if part_of(path) not in ("cluster", "tune"):
        assert not any(name.split(".")[0] == "ray" for name in imports_of(path))


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "core"], ids=lambda path: path.name)
def test_the_core_needs_torch_and_the_standard_library_only(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)} - {"rlr_ray"}
    assert tops <= {"torch", *sys.stdlib_module_names}


def test_everything_but_cluster_and_tune_imports_without_ray() -> None:
    """By following all imports that are not in a function."""
    bodies = {module_of(path): names_in(ast.parse(path.read_text("utf-8")).body) for path in FILES}
    outside = {module_of(path) for path in FILES if part_of(path) not in ("cluster", "tune")}
    reached: set[str] = set()
    while outside - reached:
        reached |= outside
        outside = {name for module in reached for name in bodies[module] if name in bodies}
    assert "rlr_ray.cluster.run" in reached  # which needs no Ray until it is called
    assert not [module for module in reached if any(name.split(".")[0] == "ray" for name in bodies[module])]
