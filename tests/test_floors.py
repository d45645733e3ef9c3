"""Imports point down, and nothing but rlr_ray.cluster and rlr_ray.tune needs Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlr_ray

PACKAGE = Path(rlr_ray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Lowest first: a module may import those of its own line and of the lines above it in this list.
FLOORS = [
    {"core", "errors", "strict"},
    {"disk", "memory"},
    {"presets", "assets", "cluster_config", "prompts_config", "dcot_config"},
    {"rewards"},
    {"reward_config"},
    {"estimator_config"},
    {"checks", "config"},  # checks names config in its types only
    {"recipes"},
    {"prompts", "models", "surrogate"},
    {"sampler"},
    {"engine", "pictures", "metrics", "checkpoints", "lock", "page"},
    {"evaluate", "state", "run_folder"},
    {"describe"},
    {"report", "guards"},
    {"results", "recorder"},
    {"loop", "doctor"},
    {"lab"},
    {"progress"},
    {"cluster"},
    {"start"},
    {"tune"},
    {"commands", "resuming"},
    {"dcot", "evaluation"},
    {"cli"},
    {"__main__"},
]


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_cluster_and_tune_import_ray(path: Path) -> None:
    if part_of(path) not in ("cluster", "tune"):
        assert not any(name.split(".")[0] == "ray" for name in imports_of(path))


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "core"], ids=lambda path: path.name)
def test_the_core_needs_torch_and_the_standard_library_only(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)} - {"rlr_ray"}
    assert tops <= {"torch", *sys.stdlib_module_names}


def test_everything_but_cluster_and_tune_imports_without_ray() -> None:
    modules = [
        "rlr_ray." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in FILES
        if part_of(path) not in ("cluster", "tune", "__init__")
    ]
    code = "import importlib, sys\nsys.modules['ray'] = None\n"  # importing it now fails as if it were not installed
    code += "\n".join(f"importlib.import_module({name.removesuffix('.__init__')!r})" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
