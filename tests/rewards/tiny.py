"""Reward models with small random weights, saved as the real ones are, to be loaded by the same code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rlr_ray.assets import DIGITS
from rlr_ray.rewards import load_reward
from scripts.imagereward_golden import filled
from tests.rewards.open_clip import OpenClip

CPU = torch.device("cpu")
TOKENIZER = DIGITS / "pipeline" / "tokenizer"
GOLDEN = json.loads((Path(__file__).parent / "imagereward.json").read_text())
SIZE = 32  # pixels of the images that all of them expect
HPSV2_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "dog", "two", "boats", "snow", "[MASK]"]


def save_clip(folder: Path) -> dict[str, Any]:
    """Returns the reward's options, as do the others."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return {"path": str(folder)}


def aesthetic_head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 8), nn.Dropout(), nn.Linear(8, 4), nn.Dropout(), nn.Linear(4, 1)).eval()


def save_aesthetic(folder: Path) -> dict[str, Any]:
    head = {f"layers.{name}": value for name, value in aesthetic_head().state_dict().items()}
    torch.save(head, folder / "head.pth")
    return save_clip(folder) | {"head": str(folder / "head.pth")}


def open_clip() -> OpenClip:
    torch.manual_seed(0)
    return OpenClip(len(CLIPTokenizer.from_pretrained(TOKENIZER)), longest=16).double().eval()


def save_hpsv2(folder: Path, version: str = "2.1") -> dict[str, Any]:
    torch.save({"state_dict": open_clip().state_dict()}, folder / HPSV2_FILES[version])
    return {"path": str(folder), "tokenizer": str(TOKENIZER), "version": version}


def save_imagereward(folder: Path, golden: dict[str, Any] = GOLDEN, seed: int = 0) -> dict[str, Any]:
    torch.save(filled(golden["shapes"], seed), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(golden["text"]))
    (folder / "vocab.txt").write_text("\n".join(_WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return {"path": str(folder), "tokenizer": str(folder)}


SAVED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "aesthetic": save_aesthetic,
    "clipscore": save_clip,
    "hpsv2": save_hpsv2,
    "imagereward": save_imagereward,
    "pickscore": save_clip,
}


def load(name: str, options: dict[str, Any]) -> Any:
    """In float64."""
    built: Any = load_reward(name, options, CPU)
    return built.double() if hasattr(built, "double") else built
