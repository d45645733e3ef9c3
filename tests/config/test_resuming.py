"""Which run `train --resume` goes on with: by name, by path, after a move, with or without its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlr_ray.cli import main
from rlr_ray.config.recipe import config_of
from rlr_ray.errors import UserError
from rlr_ray.train.run_folder import RunFolder
from tests.runs import small_recipe, small_run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, its run begun in runs/short, and the working folder set to where both lie."""
    monkeypatch.chdir(tmp_path)
    RunFolder(small_run(Path("runs"))).begin(resume=False)
    return small_recipe(tmp_path)


@pytest.mark.parametrize("run", ["short", "runs/short", "./runs/../runs/short/"])
@pytest.mark.parametrize("with_recipe", [False, True])
def test_a_run_is_found_by_its_name_and_by_its_path(recipe: Path, run: str, with_recipe: bool) -> None:
    config = config_of(str(recipe) if with_recipe else None, ["train.iterations=9"], run)
    assert config.folder == recipe.parent / "runs" / "short"
    assert config.train.iterations == 9
    RunFolder(config).check(resume=True, overwrite=False)


def test_a_name_is_looked_up_where_output_dir_says(recipe: Path) -> None:
    Path("runs").rename("elsewhere")
    assert config_of(None, ["output_dir=elsewhere"], "short").folder == recipe.parent / "elsewhere" / "short"
    with pytest.raises(UserError, match=r"--resume 'short': no run lies in .*runs/short or in .*there is none"):
        config_of(None, [], "short")


def test_an_unknown_run_is_answered_with_those_that_are_there(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"'shirt': no run lies in .*allowed: a run of runs \(short\), or the path"):
        config_of(None, [], "shirt")


def test_recipe_and_run_must_be_of_one_name(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"is the run in .*short, but --config names .*other; leave out --config"):
        config_of(str(recipe), ["name=other"], "short")
    with pytest.raises(UserError, match=r"is the run in .*short, but --set names .*other; leave out --set"):
        config_of(None, ["name=other"], "short")


def test_neither_recipe_nor_run_says_what_to_write(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--resume"], ["--resume-or-start"], ["--overwrite"]):
        assert main(["train", *more]) == 2
        assert "write --config RECIPE to start a run, or --resume RUN" in capfd.readouterr().err


def test_a_resumed_runs_own_recipe_may_change_in_its_free_keys_only(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", "short", "--set", "seed=7"]) == 2
    assert "was run with another config (seed: was 0, now 7)" in capfd.readouterr().err
    assert main(["train", "--config", str(recipe), "--resume-or-start", "--set", "seed=7"]) == 2
    assert "was run with another config (seed: was 0, now 7)" in capfd.readouterr().err


def test_a_damaged_config_does_not_stop_a_run_that_is_resumed_with_its_recipe(recipe: Path) -> None:
    Path("runs/short/config.yaml").write_bytes(b"\xff: {")
    with pytest.raises(UserError, match="is not YAML"):
        config_of(None, [], "short")
    RunFolder(config_of(str(recipe), [], "short")).check(resume=True, overwrite=False)
