"""What is resumed is what was begun: contents that changed under the same name are refused, or measured again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlr_ray.cli import main
from rlr_ray.config.recipe import resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.train.contents import _blocks, contents_of
from rlr_ray.train.run_folder import RunFolder
from tests.runs import small_run, tiny, train_here

pytestmark = pytest.mark.usefixtures("nothing_shown")
REWARD = "def f(images): return images.mean((1, 2, 3)) * {}\nf.differentiable = True\n"
JUDGE = "def judge(images): return images.std((1, 2, 3)) * {}\n"


def _keys(**more: Any) -> dict[str, Any]:
    return {
        "model": {"name": "stable_diffusion", "path": "weights"},
        "prompts": "prompts.txt",
        "reward": {"name": "reward_of_contents.py:f"},
        "evaluation": {"judge": {"name": "judge_of_contents.py:judge", "options": {}}},
        "train": {"iterations": 2, "checkpoint_every": 1},
    } | more


def _config(**more: Any) -> RunConfig:
    return resolve(small_run(Path("runs"), **_keys(**more)))


def _write(folder: Path) -> None:
    (folder / "prompts.txt").write_text("1\n2\n")
    (folder / "reward_of_contents.py").write_text(REWARD.format(1.0))
    (folder / "judge_of_contents.py").write_text(JUDGE.format(1.0))
    shutil.copytree(tiny()["path"], folder / "weights")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run needs, and a run after one update of two."""
    folder, before = tmp_path_factory.mktemp("begun"), Path.cwd()
    _write(folder)
    os.chdir(folder)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_here(_config(), stop_after=1)
    finally:
        os.chdir(before)
    return folder


def _other_weights() -> None:
    file = next(Path("weights/unet").glob("*.safetensors"))
    weights = {name: value * 1.01 for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "prompts": (lambda: Path("prompts.txt").write_text("1\n3\n"), "prompts"),
    "a reward's module": (lambda: Path("reward_of_contents.py").write_text(REWARD.format(3.0)), "reward reward_of"),
    "a judge's module": (lambda: Path("judge_of_contents.py").write_text(JUDGE.format(3.0)), "judge judge_of"),
    "weights": (_other_weights, "model.path"),
}


@pytest.fixture
def here(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where tests work."""
    shutil.copytree(begun, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_models_single_files_and_its_revision_are_of_its_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    references = tmp_path / "hub" / "models--owner--name" / "refs"
    references.mkdir(parents=True)
    for name, commit in (("main", "abc"), ("v2", "def")):
        (references / name).write_text(commit)
    Path("unet.ckpt").write_text("one")
    model = {"path": "owner/name", "single_file": {"unet": "unet.ckpt"}}
    first = contents_of(small_run(Path("runs"), model=model))
    Path("unet.ckpt").write_text("two")
    second = contents_of(small_run(Path("runs"), model=model | {"revision": "v2"}))
    assert (first["model.path"], second["model.path"]) == ("abc", "def")
    assert first["model.single_file.unet"] != second["model.single_file.unet"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_refused_and_measured_again_if_it_is_accepted(
    change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(json.dumps(RunFolder(_config()).contents))
    act, words = CHANGES[change]
    act()
    assert main(["train", "--resume", "short"]) == 2
    error = capfd.readouterr().err
    assert f"begun with other contents of {words}" in error and "add --accept-changes" in error
    assert main(["train", "--resume", "short", "--accept-changes"]) == 0
    accepted = RunFolder(_config())
    summary = accepted.load_summary()
    assert summary["changes"] == [{"update": 1, "what": [next(name for name in before if name.startswith(words))]}]
    assert any("after update 1 other contents" in text for text in summary["warnings"])
    fresh = train_here(_config(name="fresh", train={"iterations": 1})).load_summary()
    assert summary["reward_before"] == fresh["reward_before"]
    judge = next(iter(summary["judges"]))
    assert summary["scores"][judge]["before"] == fresh["scores"][judge]["before"]
    assert main(["train", "--resume", "short"]) == 0  # what was accepted is what it is made of


@pytest.mark.usefixtures("here")
def test_what_is_the_same_goes_on_whatever_its_files_look_like() -> None:
    """Blank lines and duplicates among prompts, times of files, and another place for all of it."""
    Path("prompts.txt").write_text("\n1\n\n2\n2\n")
    os.utime("reward_of_contents.py", (1, 1))
    assert main(["train", "--resume", "short"]) == 0
    assert RunFolder(_config()).load_summary()["changes"] == []


@pytest.mark.usefixtures("here")
def test_options_that_are_files_are_contents_and_a_run_of_an_earlier_version_has_none() -> None:
    Path("head.bin").write_bytes(b"1")
    judge = {"judge": {"name": "judge_of_contents.py:judge", "options": {"head": "head.bin", "size": "large"}}}
    config = _config(evaluation=judge)
    names = {name for name in contents_of(config) if "option" in name}
    assert names == {"judge judge_of_contents.py:judge, option head"}
    Path("runs/short/contents.json").unlink()
    Path("prompts.txt").write_text("3\n")
    RunFolder(_config()).check(resume=True, overwrite=False)


@pytest.mark.usefixtures("here")
def test_a_damaged_list_of_contents_is_told() -> None:
    Path("runs/short/contents.json").write_text('{"contents": {"prom')
    folder = RunFolder(_config())
    with pytest.raises(UserError, match=r"contents.json is damaged, .* add --accept-changes"):
        folder.check(resume=True, overwrite=False)
    folder.check(resume=True, overwrite=False, accept_changes=True)
    folder.begin(resume=True)
    folder.check(resume=True, overwrite=False)


def test_of_a_large_file_blocks_are_read_that_reach_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlr_ray.train.contents._WHOLE", 100)
    monkeypatch.setattr("rlr_ray.train.contents._BLOCK", 10)
    content = bytes(torch.randint(0, 256, (1234,), generator=torch.Generator().manual_seed(0)).tolist())
    (tmp_path / "large").write_bytes(content)
    blocks = list(_blocks(tmp_path / "large"))
    assert len(blocks) == 10 and {len(block) for block in blocks} == {10}
    assert blocks[0] == content[:10] and blocks[-1] == content[-10:] and blocks[1] == content[136:146]


def test_of_a_run_whose_lora_is_begun_from_only_the_lora_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reports may be written anew."""
    monkeypatch.chdir(tmp_path)
    _write(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    lora = tmp_path / "earlier" / "lora" / "pytorch_lora_weights.safetensors"
    lora.parent.mkdir(parents=True)
    lora.write_bytes(b"1")
    (tmp_path / "earlier" / "report.html").write_text("before")
    config = _config(adapter={"from": "earlier"}, model=_keys()["model"] | {"merge": {"earlier": 0.5}})
    begun = contents_of(config)
    (tmp_path / "earlier" / "report.html").write_text("after")
    assert contents_of(config) == begun
    lora.write_bytes(b"2")
    changed = {name for name, digest in contents_of(config).items() if digest != begun[name]}
    assert changed == {"adapter.from", "model.merge earlier"}
