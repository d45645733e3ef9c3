"""`rlr-ray lab` on the embedded model: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml

from rlr_ray.cli import main
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import load_config
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.errors import UserError
from rlr_ray.lab.compare import Laboratory, standing_at
from rlr_ray.utils.files import save_sealed
from tests.runs import RECIPE, tiny


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    small = {"model": tiny(), "sampler": {"steps": 3}, "output_dir": "runs"}
    file.write_text(yaml.safe_dump(merge(RECIPE, small)))
    return file


@pytest.mark.slow
def test_every_usual_plan_is_measured(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zeroth = "{directions: isotropic, weight: 1.0}"
    own = f"mine={{preset: custom, first_order: {{steps: 1}}, sub_chain: {{length: 1}}, zeroth_order: {zeroth}}}"
    few = ["--batches", "8", "--cost", "1"]
    assert main(["lab", "--config", str(recipe), *few, "--plan", own]) == 0
    said = capsys.readouterr().out
    assert "variance x cost" in said and "kappa" in said and "left out" not in said
    told = json.loads(Path("lab/lab.json").read_text())
    rows = {row["name"]: row for row in told["plans"]}
    assert {"full_bp", "ddpo", "es", "rlr-paper, h = 2", "alignprop, K = 1", "mine", "the recipe's"} <= set(rows)
    assert told["reference"] == {"kind": "full backpropagation", "batches": 8}
    assert not rows["full_bp"]["relative_bias"] or abs(rows["full_bp"]["relative_bias"]) < 1e-5  # None: few batches
    assert rows["full_bp"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert rows["full_bp"]["cost"] == 3 + 3 + 2 * 3  # checkpointed: every step twice forwards, once back
    drawn = [PlanShape(3, 1, 1).draw("lab", number).zeroth_order[0] for number in range(rows["mine"]["batches"])]
    assert rows["mine"]["cost"] == pytest.approx(3 + 1 + 2 * (1 + 1) + 2 * 3 - sum(drawn) / len(drawn))
    assert not rows["the recipe's"]["unbiased"] and rows["rlr-paper, h = 2"]["unbiased"]
    assert [row["step"] for row in told["profile"]] == [0, 1, 2]
    assert sum(row["gradient_share"] for row in told["profile"]) == pytest.approx(1)
    table = pyarrow.parquet.read_table("lab/lab.parquet").to_pylist()
    assert [row["name"] for row in table] == list(rows)
    assert Path("lab/lab.png").stat().st_size > 10_000


def test_a_black_box_reward_is_held_against_reinforce(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["reward.differentiable=false", "estimator={preset: ddpo}"]
    words = [word for change in changes for word in ("--set", change)]
    learned = ["--plan", "learned={preset: surrogate}"]  # which would be measured with the reward in its place
    assert main(["lab", "--config", str(recipe), *words, *learned, "--batches", "8", "--cost", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "cannot be measured here" in told["left_out"]["learned"]
    assert told["reference"]["kind"] == "REINFORCE"
    assert {row["name"] for row in told["plans"]} == {"the recipe's", "ddpo", "es"}
    ddpo = next(row for row in told["plans"] if row["name"] == "ddpo")
    assert ddpo["relative_bias"] is None or ddpo["relative_bias"] == pytest.approx(0, abs=1e-4)  # its own reference


@pytest.mark.usefixtures("nothing_shown")
def test_a_checkpoint_is_where_it_measures(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "train.chains=4", "--set", "train.chains_per_prompt=2", "--set", "train.chunk_size=2"]
    assert main(["train", "--config", str(recipe), *few, "--set", "train.iterations=1"]) == 0
    words = [*f"lab --config {recipe} --batches 8 --cost 1 --only --plan".split(), "fo={preset: full_bp}", *few]
    assert main([*words, "--at", "runs/short/checkpoints/update_000001.pt"]) == 0
    start = Laboratory(load_config(str(recipe), few[1::2]), None, None, 8).measure_reference()
    assert json.loads(Path("lab/lab.json").read_text())["gradient_norm"] != float(start.rows.mean(0).norm()) > 0


def test_only_what_is_no_checkpoint_is_refused_as_one(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another kind, or of another version; a defect of ours is not blamed on the file."""
    config, file = load_config(str(recipe), []), Path("update_000001.pt")
    for other in ([1, 2], {"theta": torch.zeros(3)}, {"format": 1, "theta": torch.zeros(3)}):
        save_sealed(file, other)
        with pytest.raises(UserError, match="no checkpoint of a run that can be used: it has format"):
            standing_at(str(file), config)
    monkeypatch.setattr("rlr_ray.lab.compare.load_state", lambda *_: {"theta": torch.zeros(3)})
    with pytest.raises(KeyError):
        standing_at(str(file), config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "mine"], "holds no keys"),
        (["--plan", "mine={a: ["], "not YAML"),
        (["--only"], "--only leaves no plan"),
        (["--at", "nowhere.pt"], "is no file"),
        (["--at", "recipe.yaml"], "is no checkpoint of a run"),
        (["--batches", "1"], "--batches is 1; allowed: 8 or more"),
        (["--only", "--plan", "x={preset: measure}", "--batches", "8"], "'measure' is a choice between plans"),
    ],
)
def test_what_it_refuses(recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--config", str(recipe), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_certificate_has_plans_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--model", "toy", "--plan", "mine={preset: rlr}"]) == 2
    assert "leave out --plan" in capsys.readouterr().err
