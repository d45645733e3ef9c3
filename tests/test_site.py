"""The site: built strictly, formulas and all; and the recipes of the page for those who come from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlr_ray.config.base import read_yaml
from rlr_ray.config.recipe import parse_config
from tests.test_floors import PACKAGE

ROOT = PACKAGE.parent
RECIPES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "coming_from.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.splitlines()[0])
def test_the_recipes_of_those_who_come_from_elsewhere_load(text: str) -> None:
    assert parse_config(read_yaml(text)).train.iterations == 100


def test_every_key_that_the_page_names_is_a_key() -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
    recipe = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    sections = re.split(r"^## `?", recipe, flags=re.M)
    right = " ".join(row.split("|")[2] for row in page.splitlines() if row.startswith("| `"))
    for section, key in re.findall(r"`(train|sampler|guards|estimator|model|evaluation|cluster)\.(\w+)", right):
        if (section, key) != ("train", "group_size"):  # a short form
            assert any(part.startswith(section) and f"| `{key}` |" in part for part in sections), f"{section}.{key}"


@pytest.mark.slow
def test_the_site_builds_without_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'rlr-ray[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = {page.name: page.read_text("utf-8") for page in tmp_path.glob("*.html")}
    assert {"index.html", "estimators.html", "coming_from.html", "changelog.html"} <= set(pages)
    assert pages["estimators.html"].count("<math ") > 400 and "formula0here" not in "".join(pages.values())
    assert (tmp_path / "files" / "configs" / "digits.yaml").is_file()
    hosts = re.findall(r'(?:src|href)="(?:https?:)?//([^/"]+)', "".join(pages.values()))
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', "".join(pages.values())), set(hosts)
