"""Memory of backpropagation, as bytes that autograd keeps alive."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler
from rlr_ray.lab.toy import STEPS, toy_chains, toy_reward, toy_sampler, toy_schedule, toy_theta
from tests.toy import toy_trajectory

CHAINS = toy_chains(1000, seed=0)
LATENT_BYTES = 1000 * 2 * 8


def saved_bytes(work: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that the outermost graph saves for its backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in storages.values())


def test_a_sub_chain_is_linear_in_its_length() -> None:
    """Every further step adds the same bytes, to 1 %."""
    trajectory, advantage = toy_trajectory(CHAINS), torch.ones(1000).double()

    def work(length: int) -> Callable[[], Any]:
        return lambda: half_order(toy_sampler(), toy_theta(), trajectory, range(0, length), advantage)

    sizes = [saved_bytes(work(length)) for length in range(1, 6)]
    steps = [after - before for before, after in itertools.pairwise(sizes)]
    assert max(steps) - min(steps) <= 0.01 * min(steps)
    assert min(steps) > LATENT_BYTES


def wide_denoiser(theta: torch.Tensor, latent: torch.Tensor, timestep: int, conditioning: Any) -> torch.Tensor:
    """100 activations a chain, so that they outweigh its latent of 2."""
    hidden = torch.tanh(latent.flatten(1) @ theta.view(2, 100))
    return (hidden @ theta.view(100, 2)).view_as(latent)


def test_checkpointed_steps_keep_their_latents_only() -> None:
    """A plain step keeps its 100 activations a chain; a checkpointed one at most its input, noise and output."""
    theta = torch.full((200,), 0.01, dtype=torch.float64)

    def work(last: int, checkpoint_steps: bool) -> Callable[[], Any]:
        start = toy_trajectory(CHAINS, STEPS - last)
        return lambda: first_order(
            Sampler(wide_denoiser, toy_schedule()), theta, start, toy_reward, checkpoint_steps=checkpoint_steps
        )

    plain = (saved_bytes(work(5, False)) - saved_bytes(work(1, False))) / 4
    checkpointed = (saved_bytes(work(5, True)) - saved_bytes(work(1, True))) / 4
    assert plain >= 50 * LATENT_BYTES
    assert checkpointed <= 3 * LATENT_BYTES
