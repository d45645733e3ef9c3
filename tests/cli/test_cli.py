"""The command as a user types it: what it says, and what it says when something must be mended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlr_ray.cli import _COMMANDS, _function, arguments, main
from rlr_ray.config.recipe import load_config
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.loggers.registry import build_loggers
from rlr_ray.train.run_folder import RunFolder
from tests.runs import RECIPE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a short run, and the working folder set to where it lies."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"output_dir": "runs"}))
    return file


def train(recipe: Path, *changes: str) -> list[str]:
    """The command's words."""
    return ["train", "--config", str(recipe), *(word for change in changes for word in ("--set", change))]


def test_own_prompts_reward_and_pipeline(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_prompts.jsonl").write_text('{"prompt": "one", "wish": 0.2}\n{"prompt": "two", "wish": 0.8}\n')
    Path("my_reward_for_cli.py").write_text(
        "import torch\n"
        "def brightness(images, prompts, metadata):\n"
        "    wish = torch.tensor([row['wish'] for row in metadata])\n"
        "    return -(images.mean((1, 2, 3)) - wish).abs()\n"
        "brightness.differentiable = True\n"
    )
    pipeline = ROOT / "rlr_ray" / "assets" / "digits" / "pipeline"
    changes = ["prompts=my_prompts.jsonl", "reward={name: my_reward_for_cli:brightness}", "evaluation.judge=null"]
    changes += [f"model={{name: stable_diffusion, path: {pipeline}}}", "train.iterations=2"]
    assert main(train(recipe, *changes)) == 0
    said = capsys.readouterr().out
    assert "held-out reward" in said and "before_after.png" in said and "judge" not in said
    summary = json.loads(Path("runs/short/summary.json").read_text())
    assert -0.8 < summary["reward_before"] < 0 and not summary["judges"]


def test_a_run_says_what_became_of_its_prompts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a handwritten three " + "a " * 14
    Path("my.csv").write_text(f"prompt,negative_prompt\none,\n\n{long},\na handwritten two,two\none,\n")
    assert main(train(recipe, "prompts=my.csv", "sampler.guidance_scale=2", "train.iterations=1")) == 0
    said = capsys.readouterr().out
    same = "prompts: 3 to train on; held-out chains have the same\n"
    assert f"{same}note: prompts file 'my.csv': 1 duplicate left out\n" in said
    cut = "note: 1 of 4 prompts are longer than the model's tokenizer takes, so their ends are cut off; the first: "
    assert said.count(f"{cut}{long.strip()!r}") == 1
    chains = json.loads(Path("runs/short/samples/chains.json").read_text())
    assert [chain["prompt"] for chain in chains] == ["one", long.strip(), "a handwritten two", "one"]
    assert [chain.get("negative_prompt") for chain in chains] == [None, None, "two", None]


@pytest.mark.usefixtures("nothing_shown")
def test_an_adapter_that_diffusers_does_not_load_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = "adapter={type: IA3, target_modules: [attn2.to_out.0], feedforward_modules: []}"
    assert main(train(recipe, adapter, "train.iterations=1")) == 0
    assert "load it with peft.PeftModel.from_pretrained(pipeline.unet, folder)" in capsys.readouterr().out
    assert Path("runs/short/adapter/adapter_config.json").is_file()


def test_a_run_in_one_process_needs_no_ray(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("rlr_ray.cluster", "rlr_ray.tune"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails, as if it were not installed
    assert main(train(recipe, "train.iterations=1")) == 0
    assert Path("runs/short/summary.json").is_file()


def test_the_command_is_that_of_the_module() -> None:
    """tests/train/test_checkpoints.py kills runs and resumes them."""
    command = [sys.executable, "-m", "rlr_ray"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: rlr-ray" in done.stderr


def test_dry_run_prints_the_plan_and_leaves_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "first order on the last 1; half order on a sub-chain of 2 steps; zeroth order on the other 2" in said
    # 8 chains of 5 steps, 2 again for half order; 8 pairs of 5 steps, of which 2 before the perturbed ones are shared;
    # backwards through 1 + 2 steps
    assert PlanShape(5, 1, 2).draw(0, 0).zeroth_order == (2, 3)
    assert "120 denoiser forwards, 24 backwards; 4 updates" in said
    assert not Path("runs").exists()


def test_only_what_runs_a_recipe_imports_its_code_from_the_working_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_code_for_cli.py").write_text("print('imported', file=open('imported', 'w'))\nclass Mine: pass")
    keys = ["reward={name: own_code_for_cli:reward}", "loggers=[own_code_for_cli:Mine]", "evaluation.judge=null"]
    _, *words = train(recipe, *keys)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    assert main(["train", *words, "--dry-run"]) == main(["doctor", *words]) == 0
    assert not Path("imported").exists()
    built = build_loggers(load_config(str(recipe), keys))
    assert [type(one).__name__ for one in built.values()] == ["Mine"] and Path("imported").exists()


def test_a_biased_plan_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--config", str(recipe), "--dry-run", "--set", "estimator={preset: alignprop}"])
    assert "biased: the gradient through the steps that nothing owns is dropped" in capsys.readouterr().out


BROKEN_REWARDS = """
import torch
def nan(images, prompts, metadata): return images.mean((1, 2, 3)) * float("nan")
def one(images, prompts, metadata): return images.mean()
def cut(images, prompts, metadata): return images.mean((1, 2, 3)).detach()
nan.differentiable = one.differentiable = cut.differentiable = True
def plain(images, prompts, metadata): return images.mean((1, 2, 3))
def crash(images, prompts, metadata): raise KeyError("score")
crash.differentiable = True
"""
BAD = {
    "a mistyped key": (["train.iteration=3"], ["train.iteration", "no such key", "iterations"]),
    "scale 0": (["estimator.zeroth_order.scale=0"], ["scale", "found 0", "greater than 0"]),
    "a missing prompt file": (["prompts=none.txt"], ["none.txt", "not found", "write its path"]),
    "a reward that is NaN": (["reward={name: broken_rewards:nan}"], ["broken_rewards:nan", "nan", "finite"]),
    "a reward of a wrong shape": (["reward={name: broken_rewards:one}"], ["shape []", "[4]", "one score an image"]),
    "a reward without its gradient": (["reward={name: broken_rewards:cut}"], ["no gradient", "torch.no_grad"]),
    "a reward that crashes": (["reward={name: broken_rewards:crash}"], ["broken_rewards:crash", "KeyError", "score"]),
    "first order on a black box": (
        ["reward={name: broken_rewards:plain}"],
        ["black-box", "first_order.steps is 1", "first_order.steps: 0"],
    ),
    "an unknown reward": (["reward={name: digit}"], ["'digit'", "digits, digits_judge"]),
    "an unknown optimizer": (["train.optimizer=Adamm", "cluster={}"], ["train.optimizer is 'Adamm'", "AdamW"]),
    "an unknown model": (["model={name: pixart}"], ["'pixart'", "wan, digits, moving_digits"]),
    "no path": (["model={name: stable_diffusion}"], ["model.path is not set"]),
    "a judge that reads no digit": (["prompts=[a cat]"], ["'a cat'", "names one digit"]),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_with_its_remedy_and_no_traceback(
    recipe: Path, capfd: pytest.CaptureFixture[str], changes: list[str], words: list[str]
) -> None:
    Path("broken_rewards.py").write_text(BROKEN_REWARDS)
    assert main(train(recipe, *changes)) == 2
    said = capfd.readouterr().err
    assert [word for word in words if word not in said] == [], said
    assert said.count("error:") == 1 and "Traceback" not in said


@pytest.mark.usefixtures("nothing_shown")
def test_a_bad_config_costs_no_earlier_run(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = train(recipe, "train.iterations=1")
    assert main(command) == 0
    assert main([*command, "--overwrite", "--set", "adapter={type: LORA, target_modules: [nothing]}"]) == 2
    assert Path("runs/short/summary.json").is_file()
    assert main(command) == 2
    assert "already holds a run (checkpoint at update 1); allowed: --resume" in capfd.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize("mine", ["notes.txt", "samples.txt", "checkpoints/update_best.pt", "mine/a/b.txt", ".hidden"])
def test_no_command_deletes_what_no_run_wrote(recipe: Path, capfd: pytest.CaptureFixture[str], mine: str) -> None:
    config = load_config(str(recipe), [])
    RunFolder(config).begin(resume=False)
    for steps in (0, 1):  # without a checkpoint a run is begun anew unasked
        if steps:
            (config.folder / "checkpoints" / "update_000001.pt").touch()
        for name in ("metrics.jsonl", "tensorboard/events", "lora/weights", "evaluate/a.json", "samples/chains.json"):
            (config.folder / name).parent.mkdir(exist_ok=True)
            (config.folder / name).touch()
        file = config.folder / mine
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        assert main(["train", "--config", str(recipe), "--overwrite"]) == 2
        assert f"files that no run wrote: {mine}; they would be deleted with it" in capfd.readouterr().err
        assert file.read_text() == "mine"
    file.unlink()
    RunFolder(config).begin(resume=False)
    assert not RunFolder(config).checkpoints.steps() and not (config.folder / "lora").exists()


def test_the_demo_is_no_users_run() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "configs/digits.yaml" in line)
    name = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())["name"]
    assert "--overwrite" in line and "--set name=demo" in line and name != "demo"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--config", "recipe.yaml"], "nothing was begun; the same command begins again"),
        (["tune", "--config", "search.yaml"], "with --resume (in place of --overwrite) the same command goes on with"),
        (["lab", "--config", "recipe.yaml"], "the same command begins again"),
        (["plan", "--config", "recipe.yaml"], "the same command begins again"),
        (["evaluate", "runs/short"], "the same command begins again"),
        (["dcot", "expand", "--prompts", "a.txt", "--out", "b.jsonl"], "the same command goes on with what is left"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_who_is_interrupted_is_told_what_that_command_can_do(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlr_ray.cli.messages_on", interrupted)
    assert main(command) == 130
    told = capfd.readouterr().err
    assert said in told and ("--resume" in told) == (command[0] == "tune")


@pytest.mark.parametrize("command", ["expand", "lab"])
def test_a_folder_that_cannot_be_written_is_told(
    command: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("a cat")
    Path("cats.txt").write_text("a cat")
    monkeypatch.setattr("rlr_ray.lab.toy_cases.toy_cases", list)
    words = {
        "expand": ["dcot", "expand", "--prompts", "cats.txt", "--out", "file/cats.jsonl"],
        "lab": ["lab", "--model", "toy", "--out", "file/lab"],
    }
    assert main(words[command]) == 2
    assert "error: could not save: " in capfd.readouterr().err


@pytest.mark.usefixtures("nothing_shown")
def test_a_run_that_never_started_stands_in_no_ones_way(recipe: Path) -> None:
    Path("broken_rewards.py").write_text(BROKEN_REWARDS)
    command = train(recipe, "train.iterations=1")
    assert main([*command, "--set", "reward={name: broken_rewards:nan}"]) == 2
    assert main(command) == 0


def test_a_gpu_where_there_is_none(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # so that this runs on a machine with a GPU too
    assert main(train(recipe, "device=cuda")) == 2
    assert "device is 'cuda', but torch finds no CUDA device here; set device: auto" in capfd.readouterr().err


def test_help_and_what_is_mistyped_import_nothing_heavy() -> None:
    """4.6 CPU seconds where `train --help` imported what trains."""
    code = """
import sys
from rlr_ray.cli import _COMMANDS, main
for words in (*([name, "--help"] for name in _COMMANDS), ["train", "--confg", "x"], ["dcot", "expand", "--help"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == (2 if "--confg" in words else 0), words
heavy = {"torch", "diffusers", "transformers", "ray", "plotly", "matplotlib", "pydantic"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("usage: rlr-ray") == len(_COMMANDS) + 1  # and of dcot expand
    assert "unrecognized arguments: --confg" in told.stderr


def test_every_command_that_is_named_is_there() -> None:
    for _, text in re.findall(r"(command)=\"([\w:]+)\"", Path(arguments.__file__).read_text("utf-8")):
        assert callable(_function(text))
