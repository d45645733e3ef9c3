"""What a frozen denoiser sees in its middle: pictures of few pixels and many channels, to read a latent by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlr_ray.errors import UserError

SIDE, FRAMES = 4, 4  # at most, of what is seen: it is kept by the thousand


def middle_of(denoiser: nn.Module) -> nn.Module:
    """A U-Net's middle block, a transformer's middle one. Raises UserError if it has neither."""
    if isinstance(block := getattr(denoiser, "mid_block", None), nn.Module):
        return block
    rows = [getattr(denoiser, name, ()) for name in ("transformer_blocks", "single_transformer_blocks", "blocks")]
    if blocks := [block for row in rows for block in row]:
        return blocks[(len(blocks) - 1) // 2]
    raise UserError(
        f"estimator.surrogate.features is 'denoiser', but {type(denoiser).__name__} has neither a middle block nor "
        "transformer blocks; set features: latent"
    )


@contextmanager
def outputs_of(blocks: Sequence[nn.Module], left: type[BaseException]) -> Iterator[list[Tensor]]:
    """What the first of the blocks that is called puts out, which is left there by an exception.

    Of several tensors the last: a picture's tokens, not a text's. Compiled code would not call a hook, so nothing is
    compiled meanwhile.
    """
    outputs: list[Tensor] = []

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[-1] if isinstance(output, tuple) else output)
        raise left

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def pooled(seen: Tensor, grid: tuple[int, int, int], count: int) -> Tensor:  # -> [B, C', H', W']
    """A middle block's output of `count` latents, averaged to H', W' <= 4; frames, at most 4, count as channels.

    It is [B, C', h, w], [B F, C', h, w] of a video's frames one by one, or [B, N, C'] of tokens, row by row. Where
    guidance has more rows in one batch, the last are those with the prompt. `grid`: see `on_grid`.
    """
    if seen.dim() == 3:
        places = on_grid(seen[-count:], grid)
    else:
        places = seen[-count * grid[0] :].unflatten(0, (count, -1)).transpose(1, 2)
    frames, height, width = places.shape[2:]
    smaller = min(frames, FRAMES), min(height, SIDE), min(width, SIDE)
    return functional.adaptive_avg_pool3d(places.float(), smaller).flatten(1, 2)


def on_grid(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:  # [B, N, C'] -> [B, C', F, h, w]
    """Tokens of F frames, row by row, where they lie; `grid` is F, and a height and width of the same ratio."""
    frames, height, width = grid
    rows = round(math.sqrt(tokens.shape[1] / frames * height / width))
    return tokens.transpose(1, 2).unflatten(2, (frames, rows, -1))
