"""open_clip's CLIP, written down anew from torch's own attention: names, order and layout of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, size: int, patch: int, width: int, heads: int, shared: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, 2)
        self.proj = nn.Parameter(torch.randn(width, shared))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, vocabulary: int, longest: int, shared: int = 24):
        super().__init__()
        self.visual = Vision(32, 8, 160, 2, shared)
        self.token_embedding = nn.Embedding(vocabulary, 128)
        self.positional_embedding = nn.Parameter(torch.randn(longest, 128))
        self.transformer = Transformer(128, 2, 2)
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, shared))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def text(self, ids: Tensor, ends: Tensor) -> Tensor:
        """`ends`: the place of each prompt's end-of-text token."""
        count = ids.shape[1]
        mask = torch.full((count, count), float("-inf"), dtype=self.positional_embedding.dtype).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:count], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ends] @ self.text_projection
