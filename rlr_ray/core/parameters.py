"""A flat view of what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class ParameterVector:
    """The order and shapes of named tensors inside one vector theta of P numbers."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]

    def __len__(self) -> int:
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:  # [P]
        """Copy the named tensors into one vector."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views into theta by name, each in its own shape; gradients flow back to theta.

        Theta is [P], or [B, P]: then the views are [B, ...].
        """
        named = zip(self.shapes.items(), theta.split(self.sizes, dim=-1), strict=True)
        return {name: part.view(*theta.shape[:-1], *shape) for (name, shape), part in named}
