"""What stands in for parts of a pipeline while its own call is run: so that it gives the same, in less time."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from rlr_ray.errors import UserError


def rows_of(args: Any, kwargs: Any) -> int:
    """Rows of a denoiser's call."""
    return len(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor | list)))


class Zeros:
    """What functions would return, all of it 0; each is called once for every kind of its arguments.

    Where a call's rows are told, other numbers of rows are of the same kind.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, tuple[int, Any]] = {}

    def of(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> Any:
        """`rows`: of the call; 0: not told."""

        def kind(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return None
            return x.dtype, *x.shape[1:], *([len(x)] if x.dim() and len(x) != rows else [])

        key = name, *map(kind, tree_leaves((args, kwargs)))
        if key not in self.kept:
            with torch.no_grad():
                self.kept[key] = rows, tree_map_only(Tensor, torch.zeros_like, function(*args, **kwargs))
        known, zeros = self.kept[key]
        if known == rows:
            return zeros
        return tree_map_only(Tensor, lambda x: x.new_zeros(rows, *x.shape[1:]) if len(x) == known else x, zeros)


def by_rows(theta: Tensor, rows: int) -> Tensor:  # [B, P] -> [rows, P]
    """Rows are every chain's without the prompt, then every chain's with it."""
    if rows % len(theta):
        raise UserError(
            f"this pipeline calls its model with {rows} rows for {len(theta)} chains, so perturbed parameters cannot "
            "run in one batch; plan no zeroth order: set estimator.rest: none or first_order.steps: all"
        )
    return theta.repeat(rows // len(theta), 1)


def vmapped(live: Callable[..., Any], theta: Tensor, args: Any, kwargs: Any) -> Any:
    """For weights that only vmap can run in one batch: each row by itself, with as many of a text's as a video has."""
    leaves, spec = tree_flatten((args, kwargs))
    rows = [_own_rows(x, len(theta)) for x in leaves]

    def one(theta: Tensor, *inputs: Tensor) -> Any:
        taken = iter(inputs)
        mixed = [next(taken) if count else x for x, count in zip(leaves, rows, strict=True)]
        args, kwargs = tree_unflatten(mixed, spec)
        return tree_map_only(Tensor, lambda x: x[0], live(theta, args, kwargs))

    # The CPU's fused attention has no batching rule and would run row by row; the plain one has.
    with nullcontext() if theta.is_cuda else sdpa_kernel(SDPBackend.MATH):
        return vmap(one)(theta, *[x.unflatten(0, (-1, n)) for x, n in zip(leaves, rows, strict=True) if n])


def _own_rows(x: Any, count: int) -> int:
    """How many rows of an argument are each of `count` thetas' own; 0: it is everyone's."""
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) % count:
        return 0
    return len(x) // count if len(x) == count or x.dim() == 3 else 0  # [B F, L, D]: texts, repeated for frames


def lookalike(pipeline: Any) -> Any:
    """A shallow copy that knows its device: asking all modules for it takes most of a call's time before its steps."""
    copied, kind, device = copy.copy(pipeline), type(pipeline), pipeline._execution_device
    copied.__class__ = type(kind.__name__, (kind,), {"_execution_device": device})
    return copied


def states(device: torch.device) -> Tensor:
    """Of torch's own generators."""
    cpu = torch.random.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else cpu


def in_slices(decode: Callable[..., Any], dtype: torch.dtype, size: int | None) -> Callable[..., Any]:
    """A VAE's `decode` that takes latents of any dtype, so many at once, and again for their gradient (None: all)."""

    def call(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        z = z.to(dtype)
        if size is None or len(z) <= size:
            return decode(z, *args, **kwargs)

        def one(z: Tensor) -> Tensor:
            pictures: Tensor = decode(z, *args, **kwargs | {"return_dict": False})[0]
            return pictures

        with set_checkpoint_early_stop(False):  # to its end, where a causal VAE lets go of what it kept
            parts = [checkpoint(one, x, use_reentrant=False, preserve_rng_state=False) for x in z.split(size)]
        whole = torch.cat(parts)
        return SimpleNamespace(sample=whole) if kwargs.get("return_dict", True) else (whole,)

    return call


def by_latent_frame(decoder: nn.Module) -> None:
    """Let a causal VAE's decoder, called once a latent frame, compute that frame again for its gradient.

    It finds in `feat_cache` what earlier calls left there, and puts its own in place of it. Other decoders stay.
    """
    decode = decoder.forward
    if not {"feat_cache", "first_chunk"} <= inspect.signature(decode).parameters.keys():
        return

    def forward(x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool = False) -> Tensor:
        def pure(x: Tensor, *before: Any) -> tuple[Any, ...]:
            after = list(before)
            return decode(x, feat_cache=after, feat_idx=[0], first_chunk=first_chunk), *after

        frame, *feat_cache[:] = checkpoint(pure, x, *feat_cache, use_reentrant=False, preserve_rng_state=False)
        picture: Tensor = frame
        return picture

    decoder.forward = forward


def keep_signatures(module: nn.Module) -> None:
    """Signatures of attention processors, which diffusers' attention asks for at each call: 5 % of a small U-Net's."""
    for part in module.modules():
        if (processor := getattr(part, "processor", None)) is not None:
            call = type(processor).__call__
            call.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]


def recomputed(block: nn.Module, *arguments: Any) -> Any:
    """Run a block, and again for its gradient, both times with the parameters that it has now.

    Inside a `functional_call` these are not the module's own. Torch's checkpointing alone would take its own ones the
    second time, when that call is over, and the gradient would silently be of other values.
    """
    swapped = ((name, value) for name, value in block.named_parameters() if not isinstance(value, nn.Parameter))
    now: dict[str, Tensor] = dict(swapped)  # the others, which may be cut among processes, are the block's own
    call = functools.partial(functional_call, block, now, tie_weights=False)
    return checkpoint(call, arguments, use_reentrant=False, preserve_rng_state=False)


class Silent:
    """In place of a progress bar, which takes long to make."""

    def __init__(self, iterable: Iterable[Any] = (), **options: Any):
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, *count: Any) -> None:
        pass


def at_once(processor: Any) -> Any:
    """An image processor that denormalises all pictures as one: each by itself takes as long as a denoiser call."""
    copied = copy.copy(processor)
    apart = copied._denormalize_conditionally if hasattr(copied, "_denormalize_conditionally") else None
    if apart is not None:

        def denormalise(images: Tensor, which: list[bool] | None = None) -> Tensor:
            whole = copied.config.do_normalize if which is None else all(which)
            pictures: Tensor = copied.denormalize(images) if whole else apart(images, which)
            return pictures

        copied._denormalize_conditionally = denormalise
    return copied


def remembered(solver: Any) -> Callable[..., Any]:
    """The solver's `set_timesteps`, computed once for the same arguments."""
    compute, kept = solver.set_timesteps, {}

    @functools.wraps(compute)
    def call(*args: Any, **kwargs: Any) -> None:
        key = repr([x.tolist() if hasattr(x, "tolist") else x for x in (*args, *kwargs, *kwargs.values())])
        if key not in kept:
            compute(*args, **kwargs)
            kept[key] = {name: x for name, x in vars(solver).items() if name not in ("step", "set_timesteps")}
        vars(solver).update(kept[key])

    call.__signature__ = inspect.signature(compute)  # type: ignore[attr-defined]  # pipelines ask for it each time
    return call


def count_step(scheduler: Any, timestep: Any) -> None:
    """As `scheduler.step` does: `scale_noise` of inpainting and `scale_model_input` of Euler go by it."""
    if hasattr(scheduler, "_init_step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        scheduler._step_index += 1
