"""What stands in for parts of a pipeline while its own call is run: so that it gives the same, in less time."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from rlr_ray.errors import UserError


def by_rows(theta: Tensor, args: Any, kwargs: Any) -> Tensor:  # [B, P] -> [rows, P]
    """Rows are every chain's without the prompt, then every chain's with it."""
    rows = len(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor | list)))
    if rows % len(theta):
        raise UserError(
            f"this pipeline calls its model with {rows} rows for {len(theta)} chains, so perturbed parameters cannot "
            "run in one batch; plan no zeroth order: set estimator.rest: none or first_order.steps: all"
        )
    return theta.repeat(rows // len(theta), 1)


def vmapped(live: Callable[..., Any], theta: Tensor, args: Any, kwargs: Any) -> Any:
    """For weights that only vmap can run in one batch: each row by itself."""
    leaves, spec = tree_flatten((args, kwargs))
    own = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == len(theta) for x in leaves]

    def one(theta: Tensor, *inputs: Tensor) -> Any:
        taken = iter(inputs)
        mixed = [next(taken)[None] if mine else x for x, mine in zip(leaves, own, strict=True)]
        args, kwargs = tree_unflatten(mixed, spec)
        return tree_map_only(Tensor, lambda x: x[0], live(theta, args, kwargs))

    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention has no batching rule
        return vmap(one)(theta, *[x for x, mine in zip(leaves, own, strict=True) if mine])


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
        if size is None or len(z) <= size or kwargs.get("return_dict", True):
            return decode(z, *args, **kwargs)

        def one(z: Tensor) -> Tensor:
            pictures: Tensor = decode(z, *args, **kwargs)[0]
            return pictures

        parts = [checkpoint(one, x, use_reentrant=False, preserve_rng_state=False) for x in z.split(size)]
        return (torch.cat(parts),)

    return call


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
