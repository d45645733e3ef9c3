"""Memory of a denoiser's step at true sizes, counted without a GPU and without the memory: on fake tensors.

    python -m bench.speed.true_memory            # about 15 minutes of one core; what is counted is not counted again
    python -m bench.speed.true_memory --check    # sd14 in float32 is run on this CPU too: minutes, 8 GiB

Rows are kept in bench/results/true_memory.json. "Kept" is what `estimator.checkpoint_steps: auto` expects one more step
to keep.

Torch's fake tensors have shapes and no data, so a whole FLUX takes seconds. Every storage that an operator makes is
counted from then until it is freed; weights are apart. What kernels use inside is not seen (attention is a fused kernel
that keeps no table of scores, as on a GPU), nor what an allocator loses to gaps. A chain is guided: two rows, FLUX's
one; a pair's two signs run together. Decoder, reward and text encoders are left out. LoRA of rank 4 on the attention's
projections.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bench.common import RESULTS, Row, options, read_json, write_json
from bench.models import UNETS, denoiser
from bench.speed.measuring import rounded
from rlr_ray.train.activations import kept_bytes
from rlr_ray.utils.memory import GIB, peak_bytes

SD35: Row = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384}
SD35 |= {"caption_projection_dim": 1536, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 4
FILE = RESULTS / "true_memory.json"
CASE: Row = {"model": "sd14", "side": 64, "dtype": "float32"}  # that is run here
CHECKED = ("pair", "1 steps", "1 step, by blocks")
Inputs = Callable[[int, int], dict[str, Any]]  # of so many rows, at latents of that side


@dataclass(frozen=True)
class Shape:
    """A denoiser by its true shape."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    rows: int  # of a chain: guidance takes two


def _unet(size: str) -> Inputs:
    def inputs(rows: int, side: int) -> dict[str, Any]:
        told = {"sample": torch.randn(rows, 4, side, side), "timestep": torch.tensor(500)}
        told["encoder_hidden_states"] = torch.randn(rows, 77, UNETS[size]["cross_attention_dim"])
        added = {"text_embeds": torch.randn(rows, 1280), "time_ids": torch.randn(rows, 6)}
        return told | ({"added_cond_kwargs": added} if size == "sdxl" else {})

    return inputs


def _sd35(rows: int, side: int) -> dict[str, Any]:
    told = {"hidden_states": torch.randn(rows, 16, side, side), "timestep": torch.full((rows,), 500.0)}
    return told | {
        "encoder_hidden_states": torch.randn(rows, 333, 4096),
        "pooled_projections": torch.randn(rows, 2048),
    }


def _flux(rows: int, side: int) -> dict[str, Any]:
    patches = (side // 2) ** 2
    told = {"hidden_states": torch.randn(rows, patches, 64), "timestep": torch.full((rows,), 0.5)}
    told |= {"encoder_hidden_states": torch.randn(rows, 512, 4096), "pooled_projections": torch.randn(rows, 768)}
    return told | {
        "guidance": torch.full((rows,), 3.5),
        "img_ids": torch.zeros(patches, 3),
        "txt_ids": torch.zeros(512, 3),
    }


SHAPES = {
    "sd14": Shape(lambda: denoiser("sd14"), _unet("sd14"), 2),
    "sdxl": Shape(lambda: denoiser("sdxl"), _unet("sdxl"), 2),
    "sd35_medium": Shape(lambda: SD3Transformer2DModel(**SD35), _sd35, 2),
    "flux": Shape(lambda: FluxTransformer2DModel(guidance_embeds=True), _flux, 1),
}


class Counted(TorchDispatchMode):
    """Bytes of the storages that operators have made and that still live, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = operator(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._note(one.untyped_storage(), before)
        return made

    def _note(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key not in before and key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.zeros(RANK, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.base(x) + low


def adapted(shape: Shape) -> nn.Module:
    """The denoiser, frozen, with an adapter: by hand, since PEFT moves weights, which fake ones do not allow."""
    model = shape.build().requires_grad_(False)
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            wanted = any(f"{name}.{child}".endswith(f".{target}") for target in TARGETS)
            if wanted and isinstance(layer, nn.Linear):
                module._modules[child] = _Lora(layer)
    return model


class Steps:
    """Steps of one chain, each on the latent of the one before."""

    def __init__(self, model: Any, shape: Shape, side: int):
        self.model, self.shape, self.side = model, shape, side
        told = shape.inputs(shape.rows, side)
        (self.name, latent), *others = told.items()
        self.latent, self.others = latent.requires_grad_(), dict(others)  # the step before has a gradient, too

    def step(self, x: Tensor, k: int = 0) -> Tensor:
        return x - 0.1 * self.model(**{self.name: x}, **self.others, return_dict=False)[0]

    def gradient(self, count: int, *, by_steps: bool = False) -> None:
        """Half order's of h = `count` steps, first order's of K."""
        x = self.latent.clone()
        for _ in range(count):
            x = checkpoint(self.step, x, use_reentrant=False) if by_steps else self.step(x)
        x.float().sum().backward()
        self.latent.grad = None

    def pair(self) -> None:
        with torch.no_grad():
            self.model(**self.shape.inputs(2 * self.shape.rows, self.side), return_dict=False)

    def by_blocks(self) -> None:
        """A step whose blocks are computed again."""
        self.model.enable_gradient_checkpointing()
        self.model.train()
        self.gradient(1)
        self.model.disable_gradient_checkpointing()
        self.model.eval()

    def parts(self) -> dict[str, Callable[[], Any]]:
        parts: dict[str, Callable[[], Any]] = {"pair": self.pair}
        parts |= {f"{count} steps": partial(self.gradient, count) for count in (1, 3)}
        parts["3 steps, by steps"] = partial(self.gradient, 3, by_steps=True)
        return parts | {"1 step, by blocks": self.by_blocks}


def counted(model: str, side: int, dtype: str) -> Row:
    torch.set_default_dtype(getattr(torch, dtype))
    row: Row = {"model": model, "side": side, "dtype": dtype}
    with FakeTensorMode():
        denoised = adapted(SHAPES[model])
        row["weights_gib"] = rounded(sum(one.numel() * one.element_size() for one in denoised.parameters()) / GIB)
        steps = Steps(denoised, SHAPES[model], side)
        for part, work in steps.parts().items():
            with Counted() as count:
                work()
            row[part] = rounded(count.peak / GIB)
            denoised.zero_grad(set_to_none=True)
        row["kept"] = rounded(kept_bytes(steps.step, steps.latent) / GIB)
    torch.set_default_dtype(torch.float32)
    return row


def measured() -> dict[str, float]:
    """What sd14's parts in float32 take on this CPU, where the profiler traces every allocation."""
    model = adapted(SHAPES["sd14"])
    taken = {}
    for part, work in Steps(model, SHAPES["sd14"], 64).parts().items():
        if part in CHECKED:
            taken[part] = rounded(peak_bytes(work, torch.device("cpu")) / GIB)
            print(f"{part}: {taken[part]:.2f} GiB", flush=True)
            model.zero_grad(set_to_none=True)
    return taken


def row_of(wanted: Row, rows: list[Row]) -> Row:
    """The row of a model, a size and a dtype, counted unless it is there."""
    for row in rows:
        if wanted.items() <= row.items():
            return row
    rows.append(counted(**wanted))
    print(rows[-1], flush=True)
    write_json(FILE, rows)
    return rows[-1]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--check", action="store_true", help="run sd14 here too")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sides", nargs="+", type=int, default=[128, 64], help="of latents")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    rows: list[Row] = read_json(FILE.name) or []
    for dtype, side, name in itertools.product(args.dtypes, args.sides, args.models):
        row_of({"model": name, "side": side, "dtype": dtype}, rows)
    if args.check:
        row_of(CASE, rows)["measured"] = measured()
        write_json(FILE, rows)


if __name__ == "__main__":
    main()
