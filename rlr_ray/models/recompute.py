"""Activations that are computed again, block by block, when the gradient asks for them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *arguments: Any) -> Any:
    """Run a block, and again for its gradient, both times with the parameters that it has now.

    Inside a `functional_call` these are not the module's own. Torch's checkpointing alone would take its own ones the
    second time, when that call is over, and the gradient would silently be of other values.
    """
    now: dict[str, Tensor] = dict(block.named_parameters())
    call = functools.partial(functional_call, block, now, tie_weights=False)
    return checkpoint(call, arguments, use_reentrant=False, preserve_rng_state=False)
