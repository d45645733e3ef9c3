"""Memory of first order's activations, measured: whether those of all steps fit at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlr_ray.utils.memory import GIB, free_bytes

if TYPE_CHECKING:
    from rlr_ray.train.engine import Engine

logger = logging.getLogger(__name__)
_SHARE = 0.5  # of the free memory, which holds decoder, reward and gradients too


def must_checkpoint(engine: Engine) -> bool:
    """Whether the activations of all steps that first order passes would not fit beside all else.

    What autograd keeps of one step of one chunk, times the steps, against half of what is free: on the device, and of
    memory_budget_gib, if there is one, after the weights. Which of both a process takes changes no gradient but in the
    last bits of a GPU's kernels.
    """
    shape = max(engine.shape.alternatives, key=lambda one: one.first_order_steps)
    steps = shape.steps if shape.truncation != "fixed" else shape.first_order_steps + shape.off
    if not shape.first_order_steps or shape.linear:
        return False
    needed, free = steps * step_bytes(engine), float(free_bytes(engine.device))
    if engine.config.memory_budget_gib is not None:
        free = min(free, engine.config.memory_budget_gib * GIB - engine.held_bytes())
    checkpointed = needed > _SHARE * free
    if checkpointed:
        logger.info(
            f"first order checkpoints its {steps} steps: they would keep {needed / GIB:.3g} GiB, of {free / GIB:.3g} "
            "GiB free (estimator.checkpoint_steps: auto)"
        )
    return checkpointed


def step_bytes(engine: Engine) -> int:
    """Bytes that autograd keeps for one more step of one chunk."""
    chains = engine.train_chains(0, range(engine.config.train.chunk_size))
    theta, size = engine.model.initial_theta.detach(), len(chains.x_start)
    if engine.config.estimator.first_order.clip is not None:
        theta = theta.expand(size, -1)
    theta = theta.requires_grad_()

    def step(latent: Tensor, k: int) -> Tensor:
        noise = chains.noise[min(k, len(chains.noise) - 1)]
        return engine.sampler.step(theta, 0, latent, noise, chains.conditioning)

    return kept_bytes(step, chains.x_start)


def kept_bytes(step: Callable[[Tensor, int], Tensor], latent: Tensor) -> int:
    """Bytes that autograd keeps of a second step and the first does not keep too, as it does the weights."""
    latent = latent.detach().requires_grad_()  # as if there was one before
    kept = [dict[int, int](), dict[int, int]()]
    for k, storages in enumerate(kept):
        with torch.autograd.graph.saved_tensors_hooks(_noting(storages), lambda value: value):
            latent = step(latent, k)
    return sum(nbytes for storage, nbytes in kept[1].items() if storage not in kept[0])


def _noting(storages: dict[int, int]) -> Callable[[Tensor], Tensor]:
    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        storages[storage._cdata] = storage.nbytes()  # its place, of tensors without data too
        return value

    return note
