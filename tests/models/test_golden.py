"""Figures of tiny pipelines, as an adapter written for each family gave them, before all were run by their own call.

Last latents, pictures, gradients of first and half order, and a theta for each chain, in golden.safetensors. Rows with
the prompt and without it were one batch, but of FLUX and Wan a call each, as their pipelines have it. On the machine
that made them latents are the same bits, and all of Stable Diffusion's, SD3's and FLUX's figures; the video pipelines
scale latents in another order before their VAE, and Wan's, of random weights, makes 2e-5 of a gradient of one last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler
from rlr_ray.core.seeds import chains_noise
from tests.models import tiny
from tests.models.common import SEEDS, model_of, some_theta

LORA = {"type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["to_q", "to_out.0"]}
SAMPLER = {"steps": 4, "eta": 0.7, "guidance_scale": 3.0}
PROMPTS, NEGATIVES = ["a handwritten two", "seven", "eight"], ["a handwritten one", "two", "a"]
FILE = Path(__file__).with_name("golden.safetensors")


def save_animatediff(folder: Path) -> None:
    tiny.save_motion_adapter(folder / "motion")
    tiny.save_animatediff(folder, folder / "motion")


class Subject(NamedTuple):
    name: str  # of the model
    save: Callable[[Path], None] | None = None
    keys: dict[str, Any] = {}  # noqa: RUF012  # of the model
    call: dict[str, Any] = {}  # noqa: RUF012  # what its call is told besides
    tolerance: float = 1e-5  # of a figure's length


TEXT = {"max_sequence_length": tiny.TOKENS}
SMALL, VIDEO = {"height": 16, "width": 12}, {"height": 16, "width": 32, "num_frames": 5}
SUBJECTS = {
    "digits": Subject("digits"),
    "moving_digits": Subject("moving_digits"),
    "stable_diffusion": Subject("stable_diffusion", tiny.save_stable_diffusion, {"height": 8, "width": 16}),
    "stable_diffusion_xl": Subject("stable_diffusion_xl", tiny.save_stable_diffusion_xl, {"height": 16, "width": 24}),
    "stable_diffusion_3": Subject("stable_diffusion_3", tiny.save_stable_diffusion_3, SMALL, TEXT),
    "flux": Subject("flux", tiny.save_flux, SMALL, TEXT),
    "animatediff": Subject("animatediff", save_animatediff, {"height": 16, "width": 8, "num_frames": 3}),
    "wan": Subject("wan", tiny.save_wan, VIDEO, TEXT, tolerance=5e-5),
    "wan 2.2": Subject("wan", lambda folder: tiny.save_wan(folder, wan22=True), VIDEO, TEXT),
}


def load(subject: Subject, folder: Path, **more: Any) -> Any:
    if subject.save is None:
        return model_of(subject.name, None, LORA, SAMPLER, **subject.keys, **more)
    subject.save(folder)
    return model_of(subject.name, folder, LORA, SAMPLER, **subject.keys, **more)


def figures(model: Any, shape: tuple[int, ...], packed: Any, unpacked: Any) -> dict[str, Tensor]:
    """`packed` and `unpacked` turn latents of that shape to the model's and back."""
    theta, sampler, conditioning = some_theta(model, 0.1), Sampler(model, model.schedule), None
    first, noise = chains_noise(SEEDS, len(model.schedule), shape)
    conditioning = model.begin(SEEDS, model.encode(PROMPTS, NEGATIVES))[2]
    start = packed(first), torch.stack([packed(one) for one in noise]), conditioning
    whole, begun = sampler.sample(theta, *start), sampler.sample(theta, *start, stop=3)

    def objective(latent: Tensor) -> Tensor:
        pictures = model.decode(latent, None, conditioning)
        weights = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(5))
        return (pictures * weights).flatten(1).sum(1)

    thetas = torch.stack([some_theta(model, 0.1) * factor for factor in (0.5, 1.0, 2.0)])
    with torch.no_grad():
        apart = model(thetas, whole.latents[2], model.schedule.timesteps[2], conditioning)
        pictures = model.decode(whole.latents[-1], None, conditioning)
    return {
        "latents": unpacked(whole.latents[-1]),
        "pictures": pictures,
        "first order": first_order(sampler, theta, begun, objective)[0],
        "half order": half_order(sampler, theta, whole, range(1, 3), torch.tensor([1.0, -0.5, 0.3])),
        "thetas of chains' own": unpacked(apart),
    }


def packing(model: Any, subject: Subject) -> tuple[Any, Any]:
    """FLUX packs 2 x 2 latent pixels into a token."""
    if subject.name != "flux":
        return lambda x: x, lambda x: x
    pipeline, (height, width) = model.pipeline, subject.keys.values()
    return (
        lambda x: pipeline._pack_latents(x, len(x), *x.shape[1:]),
        lambda x: pipeline._unpack_latents(x, height, width, pipeline.vae_scale_factor),
    )


@pytest.mark.filterwarnings("ignore:sampler.guidance_scale 3 adds classifier-free guidance")
@pytest.mark.parametrize("name", SUBJECTS)
def test_figures_are_those_of_the_familys_own_adapter(name: str, tmp_path: Path) -> None:
    subject, golden = SUBJECTS[name], load_file(FILE)
    model = load(subject, tmp_path, **({"call": subject.call} if subject.call else {}))
    shape = tuple(golden[f"{name}/latents"].shape[1:])
    for key, value in figures(model, shape, *packing(model, subject)).items():
        expected = golden[f"{name}/{key}"]
        error = float((value - expected).norm() / expected.norm())
        assert error <= subject.tolerance, f"{key}: {error:g}"
