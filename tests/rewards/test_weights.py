"""What a person reads whose reward model's files are not there."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from rlr_ray.errors import UserError
from tests.rewards import tiny

CLIP = ["config.json", "*.safetensors or *.bin", "vocab.json or tokenizer.json"]
NEEDED = [  # reward, option, repository, files
    ("aesthetic", "path", "openai/clip-vit-large-patch14", CLIP),
    ("aesthetic", "head", "trl-lib/ddpo-aesthetic-predictor", ["*.pth"]),
    ("clipscore", "path", "openai/clip-vit-base-patch32", CLIP),
    ("hpsv2", "path", "xswu/HPSv2", ["HPS_v2.1_compressed.pt"]),
    ("hpsv2", "tokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ["vocab.json or tokenizer.json"]),
    ("imagereward", "path", "zai-org/ImageReward", ["ImageReward.pt", "med_config.json"]),
    ("imagereward", "tokenizer", "google-bert/bert-base-uncased", ["vocab.txt", "tokenizer_config.json"]),
    ("pickscore", "path", "yuvalkirstain/PickScore_v1", CLIP),
]


def refusal(name: str, options: dict[str, str]) -> str:
    with pytest.raises(UserError) as error:
        tiny.load(name, options)
    return str(error.value)


def test_every_reward_with_weights_is_here() -> None:
    assert {name for name, *_ in NEEDED} == set(tiny.SAVED)


@pytest.mark.parametrize(("name", "option", "repository", "files"), NEEDED)
def test_missing_files_are_named_and_how_to_get_them(
    name: str, option: str, repository: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that lacks them, and without folder or network; whatever else the reward needs is there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    options = tiny.SAVED[name](full)
    remedy = f"run `hf download {repository} --local-dir FOLDER`, and set reward.options.{option}: FOLDER"

    lacking = refusal(name, options | {option: str(empty)})
    assert f"reward {name!r}: {empty} has no {' and no '.join(files)}; " in lacking and remedy in lacking

    del options[option]
    remote = refusal(name, options)
    assert (
        f"reward {name!r}: {', '.join(files)} could not be loaded from {repository!r} (" in remote and remedy in remote
    )


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pickscore", "model.safetensors"),
        ("aesthetic", "head.pth"),
        ("hpsv2", "HPS_v2.1_compressed.pt"),
        ("imagereward", "ImageReward.pt"),
    ],
)
def test_a_broken_file_is_refused(name: str, file: str, tmp_path: Path) -> None:
    options = tiny.SAVED[name](tmp_path)
    (tmp_path / file).write_bytes(b"half a file")
    assert "could not be loaded" in refusal(name, options)


def test_a_defect_of_the_code_is_not_told_as_a_missing_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = tiny.SAVED["pickscore"](tmp_path)
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", lambda place: place.not_there)
    with pytest.raises(AttributeError, match="not_there"):
        tiny.load("pickscore", options)
