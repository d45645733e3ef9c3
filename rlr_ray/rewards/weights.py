"""A reward model's files: a folder of yours, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from rlr_ray.errors import UserError


def fetched(place: str, patterns: Sequence[str], reward: str) -> Path:
    """The folder with the files that match. `place`: a folder, else a repository, which is downloaded and kept.

    Raises UserError if it is neither, or if a pattern matches nothing.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        folder = _downloaded(place, patterns, reward)
    missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing:
        raise UserError(f"reward {reward!r}: {folder} has no {' and no '.join(missing)}; see docs/rewards.md")
    return folder


def _downloaded(repository: str, patterns: Sequence[str], reward: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # of many kinds: no network, no such repository, no leave to read it
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"reward {reward!r}: {repository!r} is no folder here, and the hub did not give it ({why}); on a machine "
            f"with a network run `hf download {repository}`, or set the option to a folder with {', '.join(patterns)}"
        ) from error


def linear_head(weights: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers one after the other, from their weights in order (dropout between them does nothing here)."""
    numbers = sorted(int(name.split(".")[-2]) for name in weights if name.endswith(".weight"))
    prefix = next(iter(weights)).rsplit(".", 2)[0]
    layers = []
    for number in numbers:
        weight, bias = (weights[f"{prefix}.{number}.{kind}"] for kind in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)
