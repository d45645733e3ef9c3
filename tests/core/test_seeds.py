"""Randomness by name."""

from __future__ import annotations

import torch

from rlr_ray.core.seeds import chain_noise, normal, permutation, seed_of
from rlr_ray.models.adapters import ParameterVector


def test_numbers_follow_from_their_names_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (normal((1000,), torch.float32, 7, name, 3) for name in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1  # standard error 0.03
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(permutation(50, 1)) == list(range(50))
    assert len({seed_of(1, "chain", step, index) for step in range(100) for index in range(100)}) == 10_000


def test_a_chain_draws_as_a_pipeline_does() -> None:
    """Against one call of torch.randn a step, as diffusers' randn_tensor makes."""
    start, noise = chain_noise(5, 3, (4, 4, 4))
    source = torch.Generator().manual_seed(5)
    for found in (start, *noise):
        assert torch.equal(found, torch.randn((1, 4, 4, 4), generator=source)[0])


def test_the_flat_view_keeps_names_and_shapes() -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4)}
    vector = ParameterVector(tensors)
    theta = vector.flatten(tensors)
    assert len(vector) == len(theta) == 10
    for name, value in vector.unflatten(theta).items():
        assert torch.equal(value, tensors[name])
