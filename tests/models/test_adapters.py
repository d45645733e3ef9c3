"""Every kind of adapter that is allowed trains and comes back; others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from rlr_ray.errors import UserError
from rlr_ray.models.adapters import APART, REFUSED
from tests.models.common import model_of, some_theta
from tests.runs import tiny

OPTIONS: dict[str, dict[str, Any]] = {  # where PEFT's own do not fit layers of 8
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 16},
    "WAVEFT": {"n_frequency": 16},
    "SHIRA": {"r": 2},
    "PSOFT": {"r": 4},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "SUPERTUNING": {"sparsity": 0.5},
    "IA3": {"feedforward_modules": []},
}
KINDS = sorted({str(kind.value) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING} - REFUSED.keys())
QUICK = ("LORA", "LOHA", "OFT", "SHIRA")


def load(kind: str, **options: Any) -> Any:
    adapter = {"type": kind, "target_modules": ["to_q", "to_v"], **OPTIONS.get(kind, {}), **options}
    return model_of("stable_diffusion", tiny()["path"], adapter, {"steps": 3, "guidance_scale": 1.0})


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_kind_trains_and_comes_back(kind: str, tmp_path: Path) -> None:
    """Gradients against differences, numbers of each chain's own against one by one, numbers and outputs of a file."""
    model = load(kind)
    theta, time = some_theta(model, 0.05), model.schedule.timesteps[1]
    x, _, prompts = model.begin([1, 2], model.encode(["a handwritten two", "seven"]))
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf, x, time, prompts).square().sum(), leaf)
    along = gradient / gradient.norm()
    with torch.no_grad():
        ends = [model(theta + sign * 0.003 * along, x, time, prompts).double().square().sum() for sign in (1, -1)]
        assert float(ends[0] - ends[1]) / 0.006 == pytest.approx(float(gradient.norm()), rel=0.1)
        thetas = torch.stack([theta, model.initial_theta + 2 * (theta - model.initial_theta)])
        together, base = model(thetas, x, time, prompts), model(model.initial_theta, x, time, prompts)
        rows = [{name: value[i : i + 1] for name, value in prompts.items()} for i in range(2)]
        apart = torch.cat([model(thetas[i], x[i : i + 1], time, rows[i]) for i in range(2)])
        assert (together - apart).norm() < 1e-3 * (apart - base).norm()
        output = model(theta, x, time, prompts)
        model.save_adapter(theta, tmp_path)
        other = load(kind)
        saved, again = other.load_adapter(tmp_path), other.encode(["a handwritten two", "seven"])
        assert torch.equal(saved, theta) and torch.equal(other(saved, x, time, again), output)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_does_not_train_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=rf"adapter\.type is '{kind}' \(.*\); allowed: ADAMSS, .*, WAVEFT"):
        load(kind)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["conv_out"]},
        {"lora_dropout": 0.5},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
)
def test_options_that_a_saved_lora_would_not_keep_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"adapter\.{next(iter(options))} is .*; leave it out"):
        load("LORA", r=2, **options)


def test_kinds_that_are_run_apart_are_kinds_that_are_allowed() -> None:
    assert set(KINDS) >= APART
