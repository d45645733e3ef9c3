"""A run's files for others: a pipeline of its own, a model card whose lines draw what the run drew, a repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from rlr_ray.cli import main
from rlr_ray.config.model import QuantizationConfig
from rlr_ray.loggers.card import _snippet
from rlr_ray.train.engine import Engine
from rlr_ray.train.picture_engine import PictureEngine
from rlr_ray.train.run_folder import RunFolder
from tests.runs import small_run, train_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """With one step off, and a picture."""
    folder = tmp_path_factory.mktemp("export")
    changes = {"train": {"iterations": 1, "learning_rate": 0.3}, "sampler": {"steps": 8}}
    return train_here(small_run(folder / "runs", **changes), shown=True)


@pytest.fixture(autouse=True)
def _inside(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path.parents[1])


def test_a_pipeline_of_its_own(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "short", "--fuse", "whole", "--set", "model.dtype=bfloat16"]
    assert main(words) == 0
    off = run.load_summary()["steps_off"]
    assert off and f"the run drew step {', '.join(map(str, off))} without" in capsys.readouterr().out
    saved = load_file(Path("whole", "unet", "diffusion_pytorch_model.safetensors"))
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    card = ModelCard.load(Path("whole", "README.md"))
    assert "pipeline = DiffusionPipeline.from_pretrained('whole'" in card.text and "load_lora" not in card.text
    DiffusionPipeline.from_pretrained("whole")
    assert main(words) == 2
    assert "--fuse whole is there already; give a folder" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlr_ray.cli.export.write_card", lambda *asked: Path("nowhere", "card").touch())
    before = {path.name for path in Path().iterdir()}
    assert main(["export", "short", "--fuse", "failed"]) == main(["export", "short", "--fuse", "."]) == 2
    assert {path.name for path in Path().iterdir()} == before


def test_a_card_says_what_the_run_did(run: RunFolder) -> None:
    summary, card = run.load_summary(), ModelCard.load(run.path / "lora" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "rlr_ray", "reinforcement-learning", "lora"],
    }
    assert (
        f"| reward | {summary['reward_before']:.4g} | {summary['reward_after']:.4g} | {summary['gain']:+.3g}"
        in card.text
    )
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", card.text)
    assert (run.path / "lora" / picture).read_bytes() == (run.path / "samples" / picture).read_bytes()
    recipe = yaml.safe_load(re.findall("```yaml\n(.*?)```", card.text, re.S)[0])
    assert recipe["adapter"] == run.config.adapter.model_dump(exclude_defaults=True) and "output_dir" not in recipe


def test_a_cards_lines_draw_what_the_run_draws(run: RunFolder) -> None:
    """In plain diffusers, with the step that is off."""
    (code,) = re.findall("```python\n(.*?)```", (run.path / "lora" / "README.md").read_text(), re.S)
    engine: PictureEngine = Engine(run.config)
    (seed,), (prompt,) = engine.held_out(range(1))
    code = code.replace("result = ", f"generator = torch.Generator().manual_seed({seed})\nresult = ")
    code = re.sub(r"pipeline\(('.*?'),", f"pipeline({prompt.text!r}, generator=generator, output_type='pt',", code)
    assert "without_adapter" in code
    drawn: dict[str, Any] = {}
    exec(code, drawn)
    expected = engine.sample(engine.model.load_adapter(run.path), range(1))[1]
    torch.testing.assert_close(drawn["result"].images, expected, atol=1e-5, rtol=0)
    on = engine.sampler.sample(engine.model.initial_theta, *engine.start([seed], [prompt])).latents[-1]
    assert (engine.model.decode(on) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"revision": "v1", "variant": "fp16"}, "DiffusionPipeline.from_pretrained('me/base', dtype=torch.float32, "),
        ({"revision": "v1", "variant": "fp16"}, "revision='v1', variant='fp16')"),
        ({"single_file": "all.safetensors"}, "= StableDiffusionPipeline.from_single_file('all.safetensors', dtype="),
        ({"single_file": "all.safetensors"}, "import DDIMScheduler, StableDiffusionPipeline"),
        (
            {"motion_adapter": "me/motion"},
            "dtype=torch.float32, motion_adapter=MotionAdapter.from_pretrained('me/motion'))",
        ),
        ({"motion_adapter": "me/motion"}, "timestep_spacing='trailing', beta_schedule=\"linear\")"),
        (
            {"quantization": QuantizationConfig(backend="torchao")},
            "# the run had its frozen weights rounded by torchao;",
        ),
        (
            {"name": "digits", "path": None},
            "import EMBEDDED\n\npipeline = DiffusionPipeline.from_pretrained(EMBEDDED['digits'], ",
        ),
        ({"single_file": {"unet": "u.gguf"}}, "# unet: with the weights of 'u.gguf'\npipeline = DiffusionPipeline."),
    ],
)
def test_a_card_reads_the_weights_that_were_trained_on(run: RunFolder, keys: dict[str, Any], words: str) -> None:
    model = run.config.model.model_copy(update={"path": "me/base"} | keys)
    lines = _snippet(run.config.model_copy(update={"model": model}), run.load_summary(), "place", False)
    assert words in "\n".join(lines)


class Unreached(Exception):
    """As the hub's HTTP client has it: no OSError."""


class Hub:
    """In place of HfApi: keeps what would be sent."""

    def __init__(self, refuses: bool = False):
        self.refuses, self.sent = refuses, dict[str, bytes]()

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> Any:
        assert private and exist_ok
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.refuses:
            raise Unreached("connection refused")
        assert repo_id == "me/digits" and "short" in commit_message
        self.sent = {file.relative_to(folder_path).as_posix(): file.read_bytes() for file in folder_path.rglob("*.*")}


def test_a_run_is_pushed(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    assert main(["push", "short", "me/digits", "--private"]) == 0
    weights = (run.path / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    assert sorted(hub.sent) == ["README.md", "before_after.png", "pytorch_lora_weights.safetensors"]
    assert hub.sent["pytorch_lora_weights.safetensors"] == weights
    assert "load_lora_weights('me/digits', weight_name=" in hub.sent["README.md"].decode()
    hub.refuses = True
    assert main(["push", "short", "me/digits", "--private"]) == 2
    assert "could not be written on the hub: connection refused; give OWNER/NAME" in capsys.readouterr().err


def test_without_a_token_nothing_is_pushed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", "short", "me/digits"]) == 2
    assert "no token for the Hugging Face hub is here; allowed" in capsys.readouterr().err
