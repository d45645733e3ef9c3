"""The embedded pipeline's folder as the libraries of 2024 read it, in which TRL's image trainers last ran."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def older_folder(source: Path, target: Path, prefix: str = "text_model.") -> Path:
    """Copy a pipeline's folder with what transformers 4 asks for.

    Its text encoder's weights have a prefix (transformers 5 saves none, and transformers 4 then starts from random
    weights with a warning), and its tokenizer reads words and merges from files of their own.
    """
    shutil.copytree(source, target)
    weights = target / "text_encoder" / "model.safetensors"
    prefixed = {prefix + name: tensor for name, tensor in load_file(weights).items()}
    save_file(prefixed, weights, {"format": "pt"})
    tokenizer = target / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tokenizer / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    (tokenizer / "tokenizer.json").unlink()
    return target
