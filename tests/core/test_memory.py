"""Memory of backpropagation, as bytes that autograd keeps alive, and of an update's sums, as bytes handed out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from rlr_ray.core.first_order import first_order
from rlr_ray.core.gradient import GradientEstimate, Penalty, estimate_gradient
from rlr_ray.core.half_order import half_order
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Sampler
from rlr_ray.core.schedule import Schedule
from rlr_ray.lab.toy import STEPS, toy_chains, toy_reward, toy_sampler, toy_schedule, toy_theta
from rlr_ray.train.update import _terms
from rlr_ray.utils.memory import peak_bytes
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


def test_an_update_holds_six_times_its_parameters_whatever_the_number_of_chunks() -> None:
    """Of float32 theta: two integers of 64 bits, two terms, and two steps' gradients that meet; a penalty is paid."""
    count, chunks = 4_000_000, 4
    theta, fixed = torch.full((2, count), 1e-3).unbind()
    sampler = Sampler(
        lambda theta, latent, timestep, conditioning: latent * (theta @ fixed),
        Schedule((2.0, 1.0, 0.0), (1.0,) * 3, (0.1,) * 3, (0.5,) * 3),
    )
    plan, draw = Plan(3, range(2, 3), (range(0, 2),), ()), torch.Generator().manual_seed(0)
    work = {}
    for c in range(chunks):
        start, *noise = torch.randn(4, 2, 1, 2, 2, generator=draw)
        work[c] = plan, Chains(start, torch.stack(noise), {}, lambda latent: latent.flatten(1).sum(1))
    penalty, groups = Penalty(0.3, 0.9 * theta, range(3)), torch.zeros(2 * chunks)
    estimates: list[GradientEstimate] = []

    def work_once() -> None:
        estimates[:] = [estimate_gradient(sampler, theta, work, groups, lambda: None, penalty=penalty)]

    vector, blocks = 4 * count, 6 * 8 * 2**18
    assert peak_bytes(work_once, torch.device("cpu")) <= (2 * 2 + 2 + 2) * vector + blocks
    weights = dict.fromkeys(estimates[0].terms, 1.0)
    assert peak_bytes(lambda: _terms(estimates[0], weights), torch.device("cpu")) <= 2 * vector + blocks
