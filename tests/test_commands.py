"""Every block of commands in the pages says above it, in a comment, who runs it, and is run.

<!-- run -->                       every command as it stands, by this file, in a folder of small recipes and runs
<!-- run, but `COMMAND`: WHY -->   the same without those that begin so
<!-- run by tests/..., ... -->     by these files
<!-- not run: WHY -->
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from rlr_ray.cli import main
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import load_config
from tests.runs import RECIPE, SMALL, tiny
from tests.test_docs import PAGES, ROOT

COMMANDS = r"rlr-ray|make|python3?|pip|ray|ssh|hf|docker|kubectl|bash|curl|source|git|export|\.venv/\S+|[A-Z_]+=\S+"
BLOCK = re.compile(r"(?:^<!-- ([^>]*) -->\n)?\n((?:^    \S.*\n)(?:^    .*\n)*)", re.M)
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
MARK = re.compile(r"run(?:, but `(?P<but>[^`]+)`: .+)?|run by (?P<by>[\w/., ]+)|not run: .+")


def blocks(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The comment above each block of commands, "" if there is none, and its lines."""
    text = page.read_text("utf-8")
    for fence in FENCE.findall(text):
        assert not re.match(r" *```(?:bash|sh|shell|console)", fence), (
            f"{page.name}: indent commands, no fence: {fence}"
        )
    for mark, block in BLOCK.findall(FENCE.sub("", text)):
        if re.match(rf"    (?:{COMMANDS})(?: |$)", block):
            yield mark, [line.strip() for line in block.splitlines()]


def run_here() -> list[str]:
    """Lines of all pages that this file runs, in the pages' order."""
    lines = []
    for mark, block in (found for page in sorted(PAGES) for found in blocks(page)):
        if (which := MARK.fullmatch(mark)) and not which["by"] and mark.startswith("run"):
            lines += [line for line in block if not (which["but"] and line.startswith(which["but"]))]
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_run_or_say_why_not(page: Path) -> None:
    for mark, block in blocks(page):
        which = MARK.fullmatch(mark)
        assert which, f"{page.name}: above {block} stands {mark!r}; allowed: see {Path(__file__).name}"
        if which["by"]:
            tests = "".join((ROOT / file).read_text("utf-8") for file in which["by"].split(", "))
            assert all(f'"{name}"' in tests for name in re.findall(r"rlr-ray (\w+)", "\n".join(block))), block
        assert not which["but"] or any(line.startswith(which["but"]) for line in block), f"{page.name}: {mark}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages speak of: recipes, prompts, a run of many names, and a search whose trials they are."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    light = {"sampler": {"steps": 2}, "estimator": {"preset": "full_bp"}, "name": "digits", "model": tiny()}
    Path("configs/digits.yaml").write_text(yaml.safe_dump(merge({**RECIPE, "estimator": {}}, merge(SMALL, light))))
    Path("my_prompts.txt").write_text("a handwritten two\n")
    shutil.copy("my_prompts.txt", "plain.txt")
    assert main(["train", "--config", "configs/digits.yaml", "--set", "train.iterations=2"]) == 0
    for name in ("demo", "one", "two", "digits-awm", "digits-tune/trials/a", "digits-tune/trials/b"):
        shutil.copytree("runs/digits", Path("runs", name))
    return tmp_path


@pytest.mark.slow
def test_every_command_that_is_said_to_be_run_runs(folder: Path) -> None:
    lines = run_here()
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "rlr-ray", f"{line}: only rlr-ray is run here"
        *words, out = words if words[-2] == ">" else (*words, ">", os.devnull)
        with Path(out).open("w") as file, redirect_stdout(file):
            assert main(words[:-1]) == 0, line
    assert len(lines) > 10 and load_config("mine.yaml", []).model.name == "digits"
