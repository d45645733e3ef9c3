"""`rlr-ray evaluate` and `rlr-ray sample` against the runs' own numbers and against plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from rlr_ray.assets import DIGITS
from rlr_ray.cli import main
from rlr_ray.config.run import RunConfig
from rlr_ray.evaluation.runs import unique_names
from rlr_ray.rewards.digits import Digits
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import small_run

CHANGES: dict[str, Any] = {
    "model": {"name": "digits"},
    "train": {"iterations": 2, "learning_rate": 0.1},
    "evaluation": {"chains": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs with different adapters, and one that has not ended."""
    folder = tmp_path_factory.mktemp("evaluate")
    runs = folder / "runs"
    finish(small_run(runs, name="one", **CHANGES))
    finish(small_run(runs, name="two", adapter={"r": 2, "lora_alpha": 8}, **CHANGES))
    RunFolder(small_run(runs, name="begun")).begin(resume=False)
    return folder


def finish(config: RunConfig) -> None:
    engine = Engine(config)
    RunFolder(config).begin(resume=False)
    train(engine, None, lambda row: None)


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def plain_images(chains: list[dict[str, Any]], lora: Path | None = None) -> numpy.ndarray:  # [n, 16, 16, 3]
    pipeline = StableDiffusionPipeline.from_pretrained(DIGITS / "pipeline", dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline(
        [chain["prompt"] for chain in chains],
        num_inference_steps=4,
        eta=1.0,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(chain["seed"]) for chain in chains],
        output_type="np",
    ).images


def read(file: str) -> Any:
    return json.loads(Path(file).read_text())


def test_a_runs_own_held_out_chains_give_its_own_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "one", "runs/two", "--seed", "0", "--out", "own"]) == 0
    said = capsys.readouterr().out
    found = read("own/evaluate.json")
    assert [run["run"] for run in found["runs"]] == ["one", "two"]
    for run in found["runs"]:
        summary, row = read(f"runs/{run['run']}/summary.json"), run["scores"]["digits"]
        assert (row["base"], row["tuned"]) == (
            pytest.approx(summary["reward_before"], abs=1e-6),
            pytest.approx(summary["reward_after"], abs=1e-12),
        )
        assert row["difference"] == pytest.approx(summary["gain"], abs=1e-6)
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert run["kl"] == pytest.approx(summary["kl"], rel=1e-6) and run["kl"] > 0
        assert found["base"]["diversity"] == summary["diversity_before"]
        assert run["diversity"] == summary["diversity_after"]
        assert row["trained_on"]
    assert read("own/chains.json")[:2] == read("runs/one/samples/chains.json")
    assert {file.name for file in Path("own").glob("*.png")} == {"base_one.png", "base_two.png", "side_by_side.png"}
    assert "digits *" in said and "6 chains of 2 prompts, --seed 0" in said and "trained on these prompts" in said


def test_a_run_named_like_the_base_model_is_compared_with_the_base_model() -> None:
    """Twice the name `base`: each difference is that which the run itself recorded."""
    for name in ("base", "elsewhere/base"):
        shutil.copytree(f"runs/{'one' if name == 'base' else 'two'}", f"runs/{name}")
    assert main(["evaluate", "base", "runs/elsewhere/base", "--seed", "0", "--out", "named"]) == 0
    report = read("named/evaluate.json")
    assert [run["run"] for run in report["runs"]] == ["base-2", "base-3"]
    for run, own in zip(report["runs"], ("one", "two"), strict=True):
        gain = read(f"runs/{own}/summary.json")["gain"]
        assert gain and run["scores"]["digits"]["difference"] == pytest.approx(gain, abs=1e-6)
    rows = pyarrow.parquet.read_table("named/evaluate.parquet").to_pylist()
    assert [row["run"] for row in rows[::6]] == ["base", "base-2", "base-3"]
    assert {file.name for file in Path("named").glob("base_*.png")} == {"base_base-2.png", "base_base-3.png"}


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        (["digits", "digits", "digits-2"], ["digits", "digits-3", "digits-2"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["base-2", "base"], ["base-2", "base-3"]),
    ],
)
def test_results_of_two_models_never_share_a_name(names: list[str], unique: list[str]) -> None:
    assert unique_names(names) == unique


def test_chains_are_paired_new_and_those_of_plain_diffusers() -> None:
    assert main(["evaluate", "one", "--reward", "second={name: digits_judge}", "--chains", "4"]) == 0
    chains = read("runs/one/evaluate/chains.json")
    assert not {chain["seed"] for chain in chains} & {chain["seed"] for chain in read("runs/one/samples/chains.json")}
    rows = pyarrow.parquet.read_table("runs/one/evaluate/evaluate.parquet").to_pylist()
    assert [row["run"] for row in rows] == ["base"] * 4 + ["one"] * 4
    for half, lora in ((rows[:4], None), (rows[4:], Path("runs/one/lora"))):
        assert [{name: row[name] for name in ("prompt", "seed")} for row in half] == chains
        images = torch.from_numpy(plain_images(chains, lora)).permute(0, 3, 1, 2)
        expected = Digits()(images, [chain["prompt"] for chain in chains], [{}] * 4)
        assert [row["score_digits"] for row in half] == pytest.approx(expected.tolist(), abs=1e-3)
    scores = read("runs/one/evaluate/evaluate.json")["runs"][0]["scores"]
    assert [scores[label]["trained_on"] for label in ("digits", "second")] == [True, False]
    before, after = ([row["score_second"] for row in half] for half in (rows[:4], rows[4:]))
    assert scores["second"]["difference"] == pytest.approx(numpy.mean(after) - numpy.mean(before))


def test_many_prompts_are_what_intervals_rest_on(capsys: pytest.CaptureFixture[str]) -> None:
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    Path("many.txt").write_text("\n".join(f"{words} {digit}" for digit in digits for words in ("a handwritten", "a")))
    assert main(["evaluate", "one", "--prompts", "many.txt", "--chains", "24", "--level", "0.9", "--out", "many"]) == 0
    said = capsys.readouterr().out
    assert "24 chains of 20 prompts" in said and "bootstrapped over prompts" in said and "90 % interval" in said
    assert "trained on these prompts" not in said
    assert read("many/evaluate.json")["intervals_resample"] == "prompts"


@pytest.mark.parametrize("run", ["one", None])
def test_sampled_pictures_are_those_of_plain_diffusers_and_need_no_reward(run: str | None) -> None:
    if run is None:
        recipe = yaml.safe_load(Path("runs/one/config.yaml").read_text()) | {"rewards": {"nowhere:reward": {}}}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = [run] if run else ["--config", "recipe.yaml"]
    assert main(["sample", *given, "--count", "2", "--seed", "7", "--out", "drawn"]) == 0
    chains = read("drawn/chains.json")
    names = [f"000{i % 2}_a-handwritten-{('three', 'eight')[i % 2]}_{i // 2}.png" for i in range(4)]
    assert [chain["file"] for chain in chains] == names
    drawn = numpy.stack([numpy.asarray(Image.open(f"drawn/{name}")) for name in names]) / 255
    expected = plain_images(chains, Path("runs/one/lora") if run else None)
    assert abs(drawn - expected).max() < 0.5 / 255 + 1e-4
    assert Image.open("drawn/grid.png").size == (2 * 96, 96)  # the first evaluation.pictures


def test_a_run_is_sampled_on_its_own_held_out_chains_if_nothing_else_is_said() -> None:
    assert main(["sample", "two"]) == 0
    own = [{name: chain[name] for name in ("prompt", "seed")} for chain in read("runs/two/sample/chains.json")]
    assert own == read("runs/two/samples/chains.json")


def test_a_sampler_without_noise_is_evaluated_though_the_runs_plan_needs_noise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["--set", "sampler.eta=0", "--set", "guards.kl_penalty=1"]
    assert main(["evaluate", "one", *changes, "--chains", "2", "--out", "still"]) == 0
    assert "none: no noise" in capsys.readouterr().out
    assert read("still/evaluate.json")["runs"][0]["kl"] is None


BAD = {
    "an unknown run": (["evaluate", "none"], ["run 'none': no run lies in", "begun, one, two"]),
    "a run that has not ended": (["evaluate", "begun"], ["has not ended", "train --resume begun"]),
    "a run named twice": (["evaluate", "one", "runs/one"], ["named before", "once"]),
    "another sampler": (
        ["evaluate", "one", "--config", "other.yaml"],
        ["run one has sampler", "'steps': 4", "other.yaml has", "'steps': 7", "evaluate it apart"],
    ),
    "one chain": (["evaluate", "one", "--chains", "1"], ["evaluation.chains: found 1", "greater than or equal to 2"]),
    "a level of 95": (["evaluate", "one", "--level", "95"], ["--level is 95", "between 0 and 1"]),
    "a reward that is there": (["evaluate", "one", "--reward", "digits"], ["'digits' is there already", "label"]),
    "a reward that is not known": (["evaluate", "one", "--reward", "digit"], ["'digit' is not known", "allowed"]),
    "a reward that is not YAML": (["evaluate", "one", "--reward", "x={"], ["'x={'", "not YAML"]),
    "a mistyped key of a reward": (
        ["evaluate", "one", "--reward", "digits_judge={option: {}}"],
        ["evaluation.judges.digits_judge.option: no such key", "options"],
    ),
    "prompts that are not there": (["sample", "one", "--prompts", "none.txt"], ["none.txt", "not found"]),
    "nothing to sample": (["sample"], ["RUN or --config RECIPE"]),
    "a run and a recipe": (["sample", "one", "--config", "other.yaml"], ["one of them"]),
    "no picture": (["sample", "one", "--count", "0"], ["--count is 0", "1 or more"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_is_named_with_its_remedy(
    arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load(Path("runs/one/config.yaml").read_text())
    Path("other.yaml").write_text(yaml.safe_dump(recipe | {"sampler": recipe["sampler"] | {"steps": 7}}))
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert [word for word in words if word not in said] == [], said
    assert said.count("error:") == 1 and "Traceback" not in said


def test_an_adapter_that_is_not_the_runs_own_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    file = Path("runs/two/lora/pytorch_lora_weights.safetensors")
    kept = file.read_bytes()
    file.write_bytes(Path("runs/one/lora/pytorch_lora_weights.safetensors").read_bytes())
    assert main(["sample", "two", "--out", "wrong"]) == 2
    file.write_bytes(kept)
    said = capfd.readouterr().err
    assert "'lora_alpha': 1" in said and "'lora_alpha': 8" in said
