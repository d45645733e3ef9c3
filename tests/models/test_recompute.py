"""Block checkpointing: the same gradients, at any theta, from fewer activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler, Trajectory
from rlr_ray.utils.memory import peak_bytes
from tests.models.common import CPU, calls, model_of, some_theta
from tests.models.tiny import save_stable_diffusion_3

LORA = {"type": "LORA", "r": 2, "target_modules": ["to_q", "to_out.0"]}
SHARED = {"type": "VBLORA", "r": 2, "num_vectors": 8, "vector_length": 8, "target_modules": ["to_q"]}


def load(name: str, path: str | None, again: bool, adapter: dict[str, Any]) -> Any:
    sampler = {"steps": 3, "guidance_scale": 3.0, "eta": 0.7}
    return model_of(name, path, adapter, sampler, gradient_checkpointing=again, call=calls(name))


def chains(model: Any, theta: Tensor) -> Trajectory:
    """Two guided chains after their first step; two steps are left for a gradient."""
    source = torch.Generator().manual_seed(1)
    start = torch.randn(2, *model.latent_shape, generator=source)
    noise = torch.randn(3, 2, *model.latent_shape, generator=source)
    conditioning = model.encode(["one", "two"], ["", "three"])
    return Sampler(model, model.schedule).sample(theta, start, noise, conditioning, stop=1)


def gradient(model: Any, theta: Tensor, **options: Any) -> Tensor:  # [P]
    reward = lambda latent: latent.square().flatten(1).sum(1)  # noqa: E731
    return first_order(Sampler(model, model.schedule), theta, chains(model, theta), reward, **options)[0]


@pytest.mark.filterwarnings("ignore:Keyword arguments")
@pytest.mark.parametrize(
    ("name", "adapter"),
    [("digits", LORA), ("digits", SHARED), ("stable_diffusion_3", LORA)],
    ids=["unet", "layers that share a parameter", "transformer"],
)
def test_gradients_are_the_same_at_a_theta_that_is_not_the_modules_own(
    name: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    """Of two steps, of which only one has left its activations when the way back begins; and from far less memory."""
    path = None
    if name == "stable_diffusion_3":
        save_stable_diffusion_3(tmp_path)
        path = str(tmp_path)
    plain, again = (load(name, path, choice, adapter) for choice in (False, True))
    theta = some_theta(plain)
    expected = gradient(plain, theta)
    assert_close(gradient(again, theta), expected)
    assert_close(gradient(again, theta, checkpoint_steps=True), expected)  # the one inside the other
    assert (gradient(plain, plain.initial_theta) - expected).norm() > 0.5 * expected.norm()
    half = [
        half_order(Sampler(m, m.schedule), theta, chains(m, theta), range(0, 2), torch.ones(2)) for m in (plain, again)
    ]
    assert_close(half[1], half[0])
    peaks = [peak_bytes(lambda m=model: gradient(m, theta), CPU) for model in (plain, again)]  # type: ignore[misc]
    assert peaks[1] < 0.6 * peaks[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-6 * expected.norm() and expected.norm() > 0


def test_nothing_is_computed_again_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("digits", None, True, LORA)
    theta, calls = model.initial_theta, []
    monkeypatch.setattr("rlr_ray.models.seams.checkpoint", lambda *a, **k: calls.append(a) or a[0](a[1]))
    start = chains(model, theta)
    with torch.no_grad():
        model(theta.expand(2, -1), start.latents[0], model.schedule.timesteps[1], start.conditioning)  # as rollouts do
    assert not calls
    gradient(model, theta)
    assert calls
