"""The folder that bench/peers gives to the libraries of 2024 holds the same model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from bench.peers.folder import older_folder
from rlr_ray.assets import DIGITS

PROMPTS = ["a handwritten zero", "a handwritten nine", "", "what is this?"]


def test_an_older_folder_holds_the_same_weights_and_words(tmp_path: Path) -> None:
    source = DIGITS / "pipeline"
    folder = older_folder(source, tmp_path / "pipeline")
    new, old = (load_file(place / "text_encoder" / "model.safetensors") for place in (source, folder))
    assert sorted(old) == sorted(f"text_model.{name}" for name in new)
    assert all(torch.equal(old[f"text_model.{name}"], value) for name, value in new.items())
    assert not (folder / "tokenizer" / "tokenizer.json").exists()  # so that words and merges are read
    tokens = [CLIPTokenizer.from_pretrained(place / "tokenizer")(PROMPTS).input_ids for place in (source, folder)]
    assert tokens[0] == tokens[1]
