"""`rlr-ray init` writes a recipe that is checked, commented, and runs."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from rlr_ray.cli import main
from rlr_ray.config.recipe import load_config
from tests.runs import tiny


def test_what_it_writes_is_a_recipe_of_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rew.py").write_text("def f(images): return images.mean((1, 2, 3))")
    Path("my prompts.txt").write_text("a cat\na dog: asleep\n")
    given = ["--model", tiny()["path"], "--reward", "rew.py:f", "--prompts", "my prompts.txt"]
    assert main(["init", *given]) == 0
    told = capfd.readouterr()
    Path("recipe.yaml").write_text(told.out)
    assert "2 to train on" in told.err and told.out.count("#") > 8
    config = load_config("recipe.yaml", [])
    assert config.model.path == tiny()["path"] and [*config.rewards] == ["rew.py:f"]
    assert main(["train", "--config", "recipe.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize("reward", ["digits", "{name: http, options: {url: 'http://judge:1'}}"])
def test_it_asks_on_a_terminal_for_what_is_missing(
    reward: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO(f"{reward}\n[a handwritten three, a handwritten eight]\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["init", "--model", "digits"]) == 0
    told = capfd.readouterr()
    assert "reward (one of docs/rewards.md" in told.err and "reward (one" not in told.out
    assert "prompts: [a handwritten three, a handwritten eight]" in told.out
    assert main(["init", "--model", "digits"]) == 2  # Ctrl-D
    assert "found no answer; allowed: reward (one of" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--reward", "digits"], "init was not told --prompts; give it, or run it in a terminal"),
        (["--reward", "digit", "--prompts", "animals"], "reward 'digit' is not known"),
        (["--reward", "no_such:f", "--prompts", "animals"], "no module 'no_such'"),
        (["--reward", "digits", "--prompts", "nowhere.txt"], "'nowhere.txt' was not found"),
        (["--reward", "digits", "--prompts", "animals", "--model", "./nowhere"], "there is no such folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    more: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["init", "--model", "digits", *more]) == 2
    told = capfd.readouterr()
    assert words in told.err and told.out == ""
