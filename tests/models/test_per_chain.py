"""LoRA with weights of each chain's own, against a loop over the chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.models.adapters import PerChainLinear
from rlr_ray.models.loading import load_model

LINEAR, CONVOLUTION = ["attn2.to_out.0", "to_q"], ["attn2.to_q", "conv1"]


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({"target_modules": LINEAR}, True),
        ({"target_modules": LINEAR, "use_rslora": True, "alpha_pattern": {"to_q": 8}}, True),
        ({"target_modules": CONVOLUTION}, False),
        ({"target_modules": LINEAR, "use_dora": True}, False),
        ({"target_modules": LINEAR, "lora_bias": True}, False),
    ],
    ids=["linear", "options", "convolution", "dora", "bias"],
)
def test_every_kind_of_lora_is_a_loop_over_chains(options: dict[str, Any], together: bool) -> None:
    adapter, sampler = AdapterConfig(type="LORA", r=2, **options), SamplerConfig(steps=4, guidance_scale=3.0)
    model: Any = load_model(ModelConfig(name="digits"), adapter, sampler, torch.device("cpu"))
    assert model.tuned.per_chain == together
    source = torch.Generator().manual_seed(0)
    thetas = model.initial_theta + 0.1 * torch.randn(3, len(model.initial_theta), generator=source)
    latent, conditioning = torch.randn(3, *model.latent_shape, generator=source), model.encode(["zero", "one", "two"])
    time = model.schedule.timesteps[1]
    found = model(thetas, latent, time, conditioning)
    apart = found - model(model.initial_theta, latent, time, conditioning)
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in conditioning.items()}
        expected = model(thetas[i], latent[i : i + 1], time, own)[0]
        assert (found[i] - expected).norm() < 1e-4 * apart[i].norm()


def test_a_chains_rows_stand_together_and_all_belong_to_one() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.__class__ = PerChainLinear
    rows, weights = torch.randn(4, 5, 3), torch.randn(2, 2, 3)
    found = torch.func.functional_call(layer, {"weight": weights}, rows)
    expected = [nn.functional.linear(row, weights[i // 2]) for i, row in enumerate(rows)]
    torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(AssertionError, match="3 rows do not belong to 2 chains"):
        torch.func.functional_call(layer, {"weight": weights}, rows[:3])
