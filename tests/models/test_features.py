"""A frozen denoiser's middle features: of every family, with a gradient to the latent, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from rlr_ray.assets import DIGITS
from rlr_ray.errors import UserError
from rlr_ray.models.features import middle_of, pooled
from tests.models.common import calls, model_of, some_theta
from tests.models.tiny import save_flux, save_stable_diffusion_3, save_wan

SAMPLER = {"steps": 3, "eta": 0.7, "guidance_scale": 3.0}
PROMPTS = ["one", "two"]
FAMILIES: list[tuple[str, Callable[[Path], None] | None, str, int, bool]] = [  # ..., C' of what is seen, recomputed
    ("digits", None, "attn2.to_out.0", 48, False),
    ("moving_digits", None, "attn2.to_out.0", 192, False),
    ("stable_diffusion_3", save_stable_diffusion_3, "to_q", 16, True),
    ("flux", save_flux, "to_q", 32, False),
    ("wan", save_wan, "to_q", 48, True),
]


def tiny(name: str, save: Callable[[Path], None] | None, target: str, folder: Path, again: bool) -> Any:
    if save is not None:
        save(folder)
    keys: dict[str, Any] = {"gradient_checkpointing": again, "call": calls(name)}
    if name == "wan":
        keys |= {"height": 32, "width": 16, "num_frames": 5}
    elif save is not None:
        keys |= {"height": 16, "width": 8}
    adapter = {"type": "LORA", "r": 2, "target_modules": [target]}
    return model_of(name, None if save is None else folder, adapter, SAMPLER, **keys)


@pytest.mark.filterwarnings("ignore:Keyword arguments")
@pytest.mark.parametrize(("name", "save", "target", "channels", "again"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_the_middle_is_seen_with_a_gradient_and_nothing_stays(
    name: str, save: Any, target: str, channels: int, again: bool, tmp_path: Path
) -> None:
    model = tiny(name, save, target, tmp_path, again)
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape, generator=source)
    conditioning, time = model.encode(PROMPTS), model.schedule.timesteps[1]
    first = model.features(latents, conditioning)  # while the model has met no batch of this size
    before = model(some_theta(model), latents, time, conditioning)
    seen = model.features(latents.requires_grad_(), conditioning)
    torch.testing.assert_close(first, seen.detach(), atol=0, rtol=0)
    assert seen.dim() == 4 and max(seen.shape[2:]) <= 4 and len(seen) == 2 and seen.dtype == torch.float32
    (slope,) = torch.autograd.grad(seen.square().sum(), latents)
    assert float(slope.flatten(1).norm(dim=1).min()) > 0
    for i in range(2):  # of its own latent and prompt
        own = {key: value[i : i + 1] for key, value in conditioning.items()}
        torch.testing.assert_close(model.features(latents[i : i + 1], own), seen[i : i + 1], atol=1e-4, rtol=1e-4)
    part = getattr(model.pipeline, model.trained)
    assert not any(module._forward_hooks for module in part.modules())
    torch.testing.assert_close(model(some_theta(model), latents, time, conditioning), before, atol=0, rtol=0)
    assert seen.shape[1] == channels


def test_they_are_the_plain_unets_and_of_tokens_each_place_is_its_own() -> None:
    model = tiny("digits", None, "attn2.to_out.0", Path(), False)
    latents, prompts = (
        torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1)),
        model.encode(PROMPTS),
    )
    unet = StableDiffusionPipeline.from_pretrained(DIGITS / "pipeline").unet
    seen: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    with torch.no_grad():
        embeddings = model.pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        unet(latents, int(model.schedule.timesteps[-1]), embeddings)
        torch.testing.assert_close(model.features(latents, prompts), seen[0], atol=1e-5, rtol=1e-4)
    tokens = torch.arange(2.0 * 2 * 3 * 6).view(1, -1, 1).requires_grad_()  # 2 frames of 6 x 12 latent pixels, 2 a side
    parts = pooled(tokens[:, : 2 * 3 * 6], (2, 6, 12), 1)
    assert parts.shape == (1, 2, 3, 4)
    torch.testing.assert_close(parts[0, 1, 2], torch.tensor([30.5, 31.5, 33.5, 34.5]))


def test_a_denoiser_without_a_middle_is_refused() -> None:
    with pytest.raises(UserError, match=r"'denoiser', but Linear has neither .* set features: latent"):
        middle_of(nn.Linear(2, 2))
