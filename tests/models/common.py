"""Models of one line, what they draw, and updates of all three orders on a small pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.config.estimator import merge
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.core.sampler import Sampler, Start
from rlr_ray.models.loading import load_model
from tests.models.tiny import TOKENS
from tests.runs import train_here

CPU = torch.device("cpu")
SEEDS = (11, 12, 13)


def model_of(name: str, path: Path | str | None, adapter: Mapping[str, Any], sampler: Any, **keys: Any) -> Any:
    config = ModelConfig(name=name, path=None if path is None else str(path), **keys)
    return load_model(config, AdapterConfig(**adapter), SamplerConfig(**dict(sampler)), CPU)


def some_theta(model: Any, scale: float = 0.3) -> Tensor:  # [P]
    noise = torch.randn(len(model.initial_theta), generator=torch.Generator().manual_seed(0))
    return model.initial_theta + scale * noise


def begun(model: Any, prompts: Sequence[str], negatives: Sequence[str] = ()) -> Start:
    """Chains of the first seeds."""
    start: Start = model.begin(SEEDS[: len(prompts)], model.encode(prompts, negatives))
    return start


def generators(count: int = len(SEEDS)) -> list[torch.Generator]:
    """From which a plain pipeline draws the same."""
    return [torch.Generator().manual_seed(seed) for seed in SEEDS[:count]]


@torch.no_grad()
def drawn(model: Any, theta: Tensor, prompts: Sequence[str], negatives: Sequence[str] = ()) -> Tensor:
    """Pictures [B, 3, H, W] or videos [B, n, 3, h, w] of the first seeds."""
    start = begun(model, prompts, negatives)
    chains = Sampler(model, model.schedule).sample(theta, *start)
    pictures: Tensor = model.decode(chains.latents[-1], None, start[2])
    return pictures


def calls(name: str) -> dict[str, Any]:
    """What a tiny pipeline of the name is told besides: its tokenizer takes few words."""
    return {"max_sequence_length": TOKENS} if name in ("stable_diffusion_3", "flux", "wan") else {}


def assert_same(ours: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


def assert_loop_over_chains(model: Any, prompts: Sequence[str], negatives: Sequence[str] = ()) -> None:
    """A theta for each chain predicts what each chain's own does alone."""
    thetas = torch.stack([some_theta(model) * factor for factor in (0.5, 1.0, 2.0)[: len(prompts)]])  # [B, P]
    latent = torch.randn(len(prompts), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    conditioning, time = model.encode(prompts, negatives), model.schedule.timesteps[1]
    together = model(thetas, latent, time, conditioning)
    assert (together - model(thetas[0], latent, time, conditioning))[1:].flatten(1).abs().amax(1).gt(1e-3).all()
    for i in range(len(prompts)):
        own = {name: value[i : i + 1] for name, value in conditioning.items()}
        alone = model(thetas[i], latent[i : i + 1], time, own)
        assert (together[i : i + 1] - alone).norm() < 1e-4 * alone.norm()  # rounding is 1e-6, at one theta 3e-5


def assert_last_step_is_the_base_models(model: Any, prompts: Sequence[str], negatives: Sequence[str] = ()) -> None:
    """Where it is off, whatever theta is, one or each chain's own; gradients pass through its latent alone."""
    theta, start, plain = some_theta(model), begun(model, prompts, negatives), Sampler(model, model.schedule)
    sampler = Sampler(model, model.schedule, 1, model.initial_theta)
    latents, k = sampler.sample(theta, *start).latents, len(sampler) - 1
    last = (k, latents[k].requires_grad_(), start[1][k], start[2])
    expected = plain.step(model.initial_theta, *last)
    assert_same(latents[-1], expected, 0)
    assert (plain.step(theta, *last) - expected).abs().max() > 1e-4
    apart = sampler.sample(theta.expand(len(prompts), -1), *start).latents
    torch.testing.assert_close(apart[-1], latents[-1], atol=1e-5, rtol=1e-4)
    own = theta.clone().requires_grad_()
    gradients = torch.autograd.grad(sampler.step(own, *last).sum(), (own, last[1]), allow_unused=True)
    assert gradients[0] is None and gradients[1].abs().max() > 0


def assert_close_in_float32(model: Any, reference: Any, prompts: Sequence[str], folder: Path) -> None:
    """A model of small weights predicts what one of float32 does, with adapter and chain in float32."""
    assert model.initial_theta.dtype == torch.float32 != getattr(model.pipeline, model.trained).dtype
    theta, time = some_theta(reference), reference.schedule.timesteps[1]
    latent = torch.randn(len(prompts), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    ours, expected = (one(theta, latent, time, one.encode(prompts)) for one in (model, reference))
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() < 0.05 * expected.norm()  # bfloat16 keeps 8 bits
    saved = load_file(model.save_adapter(theta, folder)).values()
    assert {tensor.dtype for tensor in saved} == {torch.float32}
    assert torch.equal(torch.cat([value.flatten() for value in saved]).sort().values, theta.sort().values)


def recipe(name: str, folder: Path, output: Path, **changes: Any) -> RunConfig:
    """A run of six updates, with `changes` put on top."""
    base = {
        "name": "run",
        "output_dir": str(output),
        "model": {"name": name, "path": str(folder), "height": 8, "width": 8, "call": calls(name)},
        "sampler": {"steps": 3, "eta": 0.7, "guidance_scale": 1.0},
        "reward": {"name": "tests.models.tiny:brightness"},
        "prompts": ["a handwritten two", "a handwritten seven"],
        "estimator": {
            "preset": "custom",
            "first_order": {"steps": 1},
            "sub_chain": {"length": 1},
            "half_order": {"baseline": "prompt", "weight": "auto"},
            "zeroth_order": {"count": 4, "chunk_size": 4},
        },
        "train": {
            "max_change": None,
            "iterations": 6,
            "chains": 8,
            "chains_per_prompt": 4,
            "chunk_size": 4,
            "learning_rate": 0.2,
            "checkpoint_every": 1,
        },
        "evaluation": {"chains": 32, "chunk_size": 32, "pictures": 2},
        "cluster": "none",
    }
    return parse_config(merge(base, changes))


def updates_raise_the_reward(
    config: Callable[[Path], RunConfig], folder: Path, *, interrupted: bool = True, shown: bool = False
) -> Path:
    """Assert that the reward rises, and that a run stopped after 4 goes on to the same bits; where the run lies."""
    whole, broken = config(folder / "whole"), config(folder / "broken")
    summary = train_here(whole, shown=shown).load_summary()
    assert summary["gain"] > 5 * summary["gain_se"] > 0
    assert summary["adapter"].startswith("lora/")
    if not interrupted:
        return whole.folder
    with pytest.raises(KeyboardInterrupt):
        train_here(broken, stop_after=4)
    assert train_here(broken, resume=True).load_summary()["gain"] == summary["gain"]
    first, second = (load_file(config.folder / summary["adapter"]) for config in (whole, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return whole.folder
