"""Models: one family a file, found by the file's name, each with `load(config, adapter, sampler, device) -> Model`.

A family's file is imported when it is asked for: diffusers and PEFT take seconds to import.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlr_ray.core.chain import Conditioning
from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError


class Model(Protocol):
    """A pipeline seen as a denoiser (see rlr_ray.core.chain.Denoiser) with what the chain needs around it."""

    schedule: Schedule
    latent_shape: tuple[int, ...]  # C, H, W; of a video C, F, H, W
    frames: int | None  # of a video that `decode` gives; None: it gives images
    initial_theta: Tensor  # [P]

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor: ...

    def encode(self, prompts: Sequence[str], negatives: Sequence[str] = ()) -> Conditioning: ...  # (): all empty

    def truncated(self, texts: Sequence[str]) -> list[str]: ...  # those that a tokenizer cuts

    def decode(self, latents: Tensor, frames: Sequence[int] | None = None) -> Tensor:
        """Images [B, 3, h, w], or videos [B, n, 3, h, w] of these frames (None: of all), in [0, 1]; differentiable."""

    def weights(self) -> int: ...  # bytes that stay loaded

    def save_adapter(self, theta: Tensor, folder: Path) -> Path: ...

    def load_adapter(self, folder: Path) -> Tensor: ...  # theta [P] that was saved in the folder


def available_models() -> list[str]:
    """Names of the models in this folder; imports every family."""
    return [name for name in _files() if hasattr(importlib.import_module(f"{__name__}.{name}"), "load")]


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load_model(config: Any, adapter: Any, sampler: Any, device: torch.device) -> Model:
    """The model that `config.name` says, with its adapter. Raises UserError if there is none of that name."""
    family: Any = importlib.import_module(f"{__name__}.{config.name}") if config.name in _files() else None
    if not hasattr(family, "load"):
        raise UserError(f"model.name is {config.name!r}; allowed: {', '.join(available_models())}")
    model: Model = family.load(config, adapter, sampler, device)
    return model


def frames_a_second(name: str) -> int:
    """Of the videos that the model of this name was trained on: its file's FRAMES_A_SECOND."""
    return int(getattr(importlib.import_module(f"{__name__}.{name}"), "FRAMES_A_SECOND", 8))


def module_bytes(module: object) -> int:
    """Bytes of a module's parameters and buffers; 0 for what is no module."""
    if not isinstance(module, nn.Module):
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
