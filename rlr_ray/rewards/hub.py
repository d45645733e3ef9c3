"""A reward model's files: a folder of yours, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.errors import UserError, first_line
from rlr_ray.utils.environment import path_of

# What no file and no network is to blame for. All else is: the hub's clients raise errors of many classes of their own.
DEFECTS = (ArithmeticError, AssertionError, AttributeError, ImportError, NameError, TypeError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Source:
    """Where the files that match `patterns` come from; a pattern may hold alternatives: 'a.bin or b.bin'.

    `place` is what reward.options.`option` holds: a folder, else a repository. `repository`: where they are by default.
    """

    reward: str
    option: str
    place: str
    repository: str
    patterns: Sequence[str]

    @property
    def folder(self) -> Path | None:
        """The user's own folder, or None if `place` is none. Raises UserError if it lacks a file."""
        folder = path_of(self.place)
        return self._complete(folder) if folder.is_dir() else None

    def fetched(self) -> Path:
        """The folder with the files: the user's, else the hub's, downloaded and kept."""
        from huggingface_hub import snapshot_download

        if folder := self.folder:
            return folder
        with self.explained():
            folder = Path(snapshot_download(self.place, allow_patterns=list(self.patterns)))
        return self._complete(folder)

    def weights(self, file: Path, **options: Any) -> dict[str, Any]:
        """The tensors of a file, on the CPU."""
        with self.explained():
            weights: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, **options)
        return weights

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A UserError for a failed load: no network, no such repository, no leave to read it, a broken file."""
        try:
            yield
        except DEFECTS:
            raise
        except Exception as error:
            why = f"could not be loaded from {self.place!r} ({first_line(error)})"
            raise self._error(f"{', '.join(self.patterns)} {why}") from error

    def _complete(self, folder: Path) -> Path:
        missing = [
            pattern for pattern in self.patterns if not any(list(folder.glob(name)) for name in pattern.split(" or "))
        ]
        if missing:
            raise self._error(f"{folder} has no {' and no '.join(missing)}")
        return folder

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"reward {self.reward!r}: {problem}; on a machine with a network run `hf download {self.repository} "
            f"--local-dir FOLDER`, and set reward.options.{self.option}: FOLDER (see docs/rewards.md)"
        )


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
