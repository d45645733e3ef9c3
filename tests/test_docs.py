"""What the pages name is there: files, links, modules, commands, makefile targets, and the floors."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bench.pages.tree import tree
from rlr_ray.cli import _COMMANDS
from tests.test_floors import FLOORS, PACKAGE

ROOT = PACKAGE.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what is gone
TOPS = "bench|configs|deploy|docs|examples|rlr_ray|scripts|tests|tune_configs"
ROOMS = set().union(*FLOORS)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_files_and_links_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    named = re.findall(rf"`((?:{TOPS})/[\w./-]*\w)`", text)
    inside = re.findall(r"`(\w+)(/\w+\.py)(?:: |`)", text)
    named += [f"rlr_ray/{room}{file}" for room, file in inside if room in ROOMS or room not in TOPS]
    missing = [path for path in named if not (ROOT / path).exists()]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_merge_is_left_unresolved(page: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text("utf-8"), re.M)


@each_page
def test_what_is_named_of_a_file_is_in_it(page: Path) -> None:
    for path, names in re.findall(r"`(\w+/\w+\.py): ([\w., ]+)`", page.read_text("utf-8")):
        code = (PACKAGE / path).read_text("utf-8")
        for name in re.split(r"[., ]+", names):
            assert re.search(rf"(?:def|class) {name}\b|^ *{name}\b.* = ", code, re.M), f"{path}: {name}"


@each_page
def test_commands_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    modules = re.findall(r"python3? -m\s+((?:bench|rlr_ray|tests)[\w.]*)", text) + re.findall(r"`(bench\.[\w.]+)", text)
    assert all(importlib.util.find_spec(module.rstrip(".")) for module in modules)
    assert set(re.findall(r"(?:^    |`)rlr-ray (\w+)", text, re.M)) <= set(_COMMANDS)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"(?:^    |`)make ([\w-]+)", text, re.M)) <= targets


def test_contributing_shows_the_floors_that_the_test_holds() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == FLOORS


def test_the_tree_has_every_file_by_its_first_line() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert tree() in page, "run `python -m bench.pages`"
