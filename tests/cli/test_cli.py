"""The command as a user types it: what it says, and what it says when something must be mended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rlr_ray.cli import main
from rlr_ray.core.plan import PlanShape
from tests.runs import RECIPE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a short run, and the working folder set to where it lies."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"output_dir": "runs"}))
    return file


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
    assert main(["train", "--config", str(recipe), *(word for change in changes for word in ("--set", change))]) == 0
    said = capsys.readouterr().out
    assert "held-out reward" in said and "before_after.png" in said and "judge" not in said
    summary = json.loads(Path("runs/short/summary.json").read_text())
    assert -0.8 < summary["reward_before"] < 0 and not summary["judges"]


def test_a_run_says_what_became_of_its_prompts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a handwritten three " + "a " * 14
    Path("my.csv").write_text(f"prompt,negative_prompt\n{long},\n\none,\na handwritten two,two\none,\n")
    changes = ["prompts={source: my.csv, held_out: [one]}", "sampler.guidance_scale=2", "train.iterations=1"]
    assert main(["train", "--config", str(recipe), *(word for change in changes for word in ("--set", change))]) == 0
    said = capsys.readouterr().out
    assert "prompts: 3 to train on; 1 held out\nnote: prompts file 'my.csv': 1 duplicate left out\n" in said
    assert (
        said.count(
            f"note: 1 of 4 prompts are longer than the model's tokenizer takes, so their ends are cut off; the "
            f"first: {long.strip()!r}"
        )
        == 1
    )
    chains = json.loads(Path("runs/short/samples/chains.json").read_text())
    assert [set(chain) for chain in chains] == [{"prompt", "seed"}] * 4 and chains[0]["prompt"] == "one"


def test_a_chain_with_a_negative_prompt_is_left_with_it(recipe: Path) -> None:
    Path("my.jsonl").write_text('{"prompt": "one", "negative_prompt": "two"}\n{"prompt": "three"}\n')
    changes = ["prompts=my.jsonl", "sampler.guidance_scale=2", "train.iterations=1"]
    assert main(["train", "--config", str(recipe), *(word for change in changes for word in ("--set", change))]) == 0
    chains = json.loads(Path("runs/short/samples/chains.json").read_text())
    assert [chain.get("negative_prompt") for chain in chains] == ["two", None, "two", None]


def test_an_adapter_that_diffusers_does_not_load_says_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = "adapter={type: IA3, target_modules: [attn2.to_out.0], feedforward_modules: []}"
    assert main(["train", "--config", str(recipe), "--set", adapter, "--set", "train.iterations=1"]) == 0
    assert "load it with peft.PeftModel.from_pretrained(pipeline.unet, folder)" in capsys.readouterr().out
    assert Path("runs/short/adapter/adapter_config.json").is_file()


def test_a_run_in_one_process_needs_no_ray(recipe: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None  # importing it fails, as if it were not installed\n"
        f"from rlr_ray.cli import main; sys.exit(main(['train', '--config', {str(recipe)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert Path("runs/short/summary.json").is_file()


def test_who_only_looks_at_a_recipe_imports_none_of_its_code(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_code_that_leaves_a_trace.py").write_text("import pathlib\npathlib.Path('trace').touch()\n")
    names = ["own_code_that_leaves_a_trace:a", "own_code_that_leaves_a_trace:b"]
    rewards = {"a": {"name": names[0]}, "digits": 1, "b": {"name": names[1], "differentiable": False}}
    own = ["--config", str(recipe), "--set", "reward=null", "--set", f"rewards={json.dumps(rewards)}"]
    own += ["--set", f"evaluation.judge={names[1]}"]
    assert main(["train", *own, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "note: a: code of your own, which a dry run does not import" in said
    assert "half order there of the others" in said  # as `b` says that it has no gradient
    main(["doctor", *own])
    assert not Path("trace").exists()
    assert main(["train", *own]) == 2
    assert Path("trace").exists()


def test_dry_run_prints_the_plan_and_leaves_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "first order on the last 1; half order on a sub-chain of 2 steps; zeroth order on the other 2" in said
    # 8 chains of 5 steps, 2 again for half order; 8 pairs of 5 steps, of which 2 before the perturbed ones are shared;
    # backwards through 1 + 2 steps
    assert PlanShape(5, 1, 2).draw(0, 0).zeroth_order == (2, 3)
    assert "120 denoiser forwards, 24 backwards; 4 updates" in said
    assert not Path("runs").exists()


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
    "h too long for T": (["estimator.sub_chain.length=7"], ["sub-chain of 7", "T = 5", "lower"]),
    "eta 0 with a sub-chain": (["sampler.eta=0"], ["sampler.eta is 0", "above 0", "set sampler.eta: 1"]),
    "scale 0": (["estimator.zeroth_order.scale=0"], ["scale", "found 0", "greater than 0"]),
    "scale below 0": (["estimator.zeroth_order.scale=-1"], ["scale", "found -1", "greater than 0"]),
    "a missing prompt file": (["prompts=none.txt"], ["none.txt", "not found", "write its path"]),
    "an empty prompt file": (["prompts=empty.txt"], ["empty.txt", "no prompt", "one a line"]),
    "a reward that is NaN": (["reward={name: broken_rewards:nan}"], ["broken_rewards:nan", "nan", "finite"]),
    "a reward of a wrong shape": (["reward={name: broken_rewards:one}"], ["shape []", "[2]", "one score an image"]),
    "a reward without its gradient": (["reward={name: broken_rewards:cut}"], ["no gradient", "torch.no_grad"]),
    "a reward that crashes": (["reward={name: broken_rewards:crash}"], ["broken_rewards:crash", "KeyError", "score"]),
    "first order on a black box": (
        ["reward={name: broken_rewards:plain}"],
        ["black-box", "first_order_steps is 1", "first_order_steps: 0"],
    ),
    "an unknown reward": (["reward={name: digit}"], ["'digit'", "digits, digits_judge"]),
    "an unknown model": (["model={name: pixart}"], ["'pixart'", "digits, flux, moving_digits, stable"]),
    "a folder that is no pipeline": (
        ["model={name: stable_diffusion, path: .}"],
        ["not a diffusers pipeline", "model_index.json", "save_pretrained"],
    ),
    "no path": (["model={name: stable_diffusion}"], ["model.path is not set"]),
    "an unknown adapter": (["adapter={type: LORRA}"], ["'LORRA'", "LORA"]),
    "a judge that reads no digit": (["prompts=[a cat]"], ["'a cat'", "names one digit"]),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_with_its_remedy_and_no_traceback(
    recipe: Path, capfd: pytest.CaptureFixture[str], changes: list[str], words: list[str]
) -> None:
    Path("empty.txt").write_text("\n")
    Path("broken_rewards.py").write_text(BROKEN_REWARDS)
    assert main(["train", "--config", str(recipe), *(word for change in changes for word in ("--set", change))]) == 2
    said = capfd.readouterr().err
    assert [word for word in words if word not in said] == [], said
    assert said.count("error:") == 1 and "Traceback" not in said


def test_a_bad_config_costs_no_earlier_run(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--config", str(recipe), "--set", "train.iterations=1"]
    assert main(command) == 0
    assert main([*command, "--overwrite", "--set", "adapter={type: LORA, target_modules: [nothing]}"]) == 2
    assert Path("runs/short/summary.json").is_file()
    assert main(command) == 2
    assert "already holds a run (checkpoint at update 1); allowed: --resume" in capfd.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_run_that_never_started_stands_in_no_ones_way(recipe: Path) -> None:
    Path("broken_rewards.py").write_text(BROKEN_REWARDS)
    command = ["train", "--config", str(recipe), "--set", "train.iterations=1"]
    assert main([*command, "--set", "reward={name: broken_rewards:nan}"]) == 2
    assert main(command) == 0


def test_a_gpu_where_there_is_none(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # so that this runs on a machine with a GPU too
    assert main(["train", "--config", str(recipe), "--set", "device=cuda"]) == 2
    assert "device is 'cuda', but torch finds no CUDA device here; set device: auto" in capfd.readouterr().err


def test_killed_run_goes_on_with_resume_to_the_same_weights(recipe: Path) -> None:
    command = [sys.executable, "-m", "rlr_ray", "train", "--config", str(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--set", "name=whole"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = Path("runs/short/checkpoints/update_000002.pt")
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("runs/short/summary.json").exists()
    subprocess.run([*command, "--resume"], check=True, env=environment, capture_output=True)
    shas = [json.loads(Path(f"runs/{name}/summary.json").read_text())["theta_sha256"] for name in ("whole", "short")]
    assert shas[0] == shas[1]
