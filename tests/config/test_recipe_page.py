"""docs/recipe.md is what the fields say, and every key has a meaning."""

from __future__ import annotations

import runpy
from pathlib import Path

from rlr_ray.config.base import keys_of
from rlr_ray.config.run import RunConfig

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "recipe_page.py"))


def test_the_page_is_as_its_script_writes_it() -> None:
    assert SCRIPT["PAGE"].read_text("utf-8") == SCRIPT["page"](), "run python -m scripts.recipe_page"


def test_every_key_is_on_it_with_a_meaning() -> None:
    rows = [line for line in SCRIPT["PAGE"].read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) == len(list(keys_of(RunConfig)))
    assert [row for row in rows if len(row.split(" | ")[-1].removesuffix(" |").strip()) < 3] == []
