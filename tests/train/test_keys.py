"""Every key that may not change when a run is resumed changes its updates, or another test is named that sees it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.config.base import is_free, keys_of
from rlr_ray.config.estimator import merge
from rlr_ray.config.run import RunConfig
from rlr_ray.train.online import online_surrogate
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import shared_engine, small_run

IMPORTANCE = {"estimator": {"sub_chain": {"length": 1, "place": "importance"}}, "sampler": {"steps": 8}}
RANDOM = {"estimator": {"sub_chain": {"length": 0}, "rest": "none", "truncation": "random", "checkpoint_steps": True}}
FULL = {"first_order": {"steps": "all"}, "checkpoint_steps": True, "sub_chain": {"length": 0}, "rest": "half_order"}
SURROGATE = {
    "estimator": FULL | {"surrogate": {"use": "residual", "threshold": 0.0, "steps_per_update": 4, "batch_size": 4}},
    "reward": {"differentiable": False},
    "train": {"chains": 8, "chains_per_prompt": 4},
}
ALONE_FIRST = {"estimator": {"first_order": {"steps": 2}, "sub_chain": {"length": 0}, "rest": "none"}}
BRANCHES = {
    "estimator": {
        "first_order": {"steps": 0},
        "half_order": {"score": "branches", "weight": 1.0},
        "sub_chain": {"length": 0},
        "rest": "half_order",
    }
}
FORWARD = {"estimator": {"half_order": {"score": "forward"}}, "guards": {"ema": 0.9}}
PENALTY = {"guards": {"kl_penalty": 1.0, "kl_steps": "all"}}
# A key, another value for it, and what else must be set for it to matter.
CHANGES: list[tuple[str, Any, dict[str, Any]]] = [
    ("seed", 1, {}),
    ("adapter.seed", 1, {}),
    ("sampler.steps", 5, {}),
    ("sampler.eta", 0.5, {}),
    ("sampler.noisy_steps", [0, 2], ALONE_FIRST),
    ("sampler.guidance_scale", 2.0, {}),
    ("sampler.timestep_spacing", "linspace", {}),
    ("estimator.first_order.steps", 2, {}),
    ("estimator.first_order.clip", 0.1, {"estimator": {"first_order": {"clip": 0.5}}}),
    ("estimator.first_order.adjoint", "linear", ALONE_FIRST),
    ("estimator.truncation", "fixed", RANDOM),
    ("estimator.sub_chain.length", 1, {}),
    ("estimator.sub_chain.count", 2, {"estimator": {"sub_chain": {"length": 1}}}),
    ("estimator.sub_chain.place", [0, 1], {}),
    ("estimator.sub_chain.place", "uniform", IMPORTANCE),
    ("estimator.rest", "none", {}),
    ("estimator.half_order.baseline", "batch", {}),
    ("estimator.half_order.baseline", "running", {}),
    ("estimator.half_order.weight", 0.5, {}),
    ("estimator.half_order.score", "branches", {}),
    ("estimator.half_order.branch_steps", 1, BRANCHES),
    ("estimator.half_order.draws", 1, FORWARD),
    ("estimator.half_order.signal", [0.3, 0.9], FORWARD),
    ("estimator.half_order.weighting", "velocity", FORWARD),
    ("estimator.half_order.pull", 1.0, FORWARD),
    ("estimator.half_order.pull_to", "base", merge(FORWARD, {"estimator": {"half_order": {"pull": 1.0}}})),
    ("estimator.zeroth_order.directions", "isotropic", {}),
    ("estimator.zeroth_order.count", 4, {}),
    ("estimator.zeroth_order.span", 1, {}),
    ("estimator.zeroth_order.clip", 0.5, {}),
    ("estimator.zeroth_order.scale", 0.02, {}),
    ("estimator.zeroth_order.weight", 0.5, {}),
    ("estimator.weight_averaging", 2, {}),
    ("estimator.smoothing", 0.5, {}),
    ("estimator.surrogate.coefficient", 0.5, SURROGATE),
    ("estimator.surrogate.threshold", 0.99, SURROGATE),
    (
        "estimator.surrogate.window",
        1,
        merge(SURROGATE, {"estimator": {"surrogate": {"steps_per_update": 20, "batch_size": 16}}}),
    ),
    ("estimator.surrogate.replay", 2, SURROGATE),
    ("estimator.surrogate.learning_rate", 1e-2, SURROGATE),
    ("estimator.surrogate.steps_per_update", 2, SURROGATE),
    ("estimator.surrogate.batch_size", 2, SURROGATE),
    ("train.chains", 8, {}),
    ("train.ahead", 1, {}),
    ("train.chains_per_prompt", 4, {}),
    ("train.chunk_size", 1, {}),
    ("train.learning_rate", 0.01, {}),
    ("train.optimizer", "Adam", {"train": {"weight_decay": 0.5}}),
    ("train.optimizer_options", {"eps": 0.1}, {}),
    ("train.warmup", 2, {}),
    ("train.own_norms", True, {"train": {"optimizer": "SGD"}}),
    ("train.clip_update", 0.01, {}),
    ("train.schedule", "cosine", {}),
    ("train.schedule_final", 0.5, {"train": {"schedule": "linear"}}),
    ("train.betas", [0.5, 0.99], {}),
    ("train.betas", [0.9, 0.5], {}),
    ("train.weight_decay", 0.5, {}),
    ("train.max_change", 1e-3, {}),
    ("train.max_grad_norm", 1e-3, {}),
    ("guards.kl_penalty", 2.0, PENALTY),
    ("guards.kl_steps", 1, PENALTY),
    ("guards.ema", 0.5, {}),
]
ELSEWHERE = {
    "threads": "tests/train/test_loop.py",
    "model.": "tests/models",
    "adapter.type": "tests/models/test_stable_diffusion.py",
    "sampler.embedded_guidance_scale": "tests/models/test_flow.py",
    "rewards": "tests/rewards/test_mixture.py",
    "prompts": "tests/prompts/test_prompts.py",
    "dcot.": "tests/cli/test_dcot.py",
    "estimator.preset": "tests/train/test_loop.py",
    "estimator.zeroth_order.chunk_size": "tests/train/test_loop.py",
    "estimator.surrogate.name": "tests/train/test_surrogate.py",
    "estimator.surrogate.options": "tests/train/test_surrogate.py",
    "estimator.surrogate.video": "tests/models/test_video.py",
    "estimator.surrogate.frames": "tests/models/test_video.py",
    "estimator.surrogate.": "tests/train/test_surrogate.py",
    "adapter.off_below": "tests/core/test_off.py",
    "adapter.from": "tests/models/test_lora_files.py",
    "adapter.strength": "tests/models/test_lora_files.py",
    "adapter.on": "tests/models/test_lora_files.py",
    "evaluation.": "tests/train/test_loop.py",
}


LATER = ("estimator.half_order.pull", "estimator.surrogate.", "train.max_change")  # seen after four updates, not two


class Run:
    """Updates of a small run, as many as are asked for."""

    def __init__(self, changes: dict[str, Any]):
        config = small_run(Path("nowhere"), **changes)
        self.engine = shared_engine(config)
        initial = self.engine.model.initial_theta
        self.state = TrainState(initial, config.train, config.estimator, config.guards)
        self.online = online_surrogate(self.engine)
        self.thetas: list[Tensor] = []  # after each update [P]

    def theta_after(self, updates: int) -> Tensor:  # [P]
        while len(self.thetas) < updates:
            update(self.engine, self.state, None, ALONE, self.online)
            self.thetas.append(self.state.theta_to_save.clone())
        return self.thetas[updates - 1]


@functools.cache
def unchanged(context: str) -> Run:
    return Run(json.loads(context))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("key", "value", "context"), CHANGES, ids=[f"{key}={value}" for key, value, _ in CHANGES])
def test_a_key_changes_what_updates_leave(key: str, value: Any, context: dict[str, Any]) -> None:
    change = value
    for name in reversed(key.split(".")):
        change = {name: change}
    changed, base = Run(merge(context, change)), unchanged(json.dumps(context, sort_keys=True))
    updates = range(1, 5 if key.startswith(LATER) else 3)
    assert any(not torch.equal(changed.theta_after(n), base.theta_after(n)) for n in updates)
    assert changed.thetas[-1].isfinite().all()


def test_every_key_is_tested() -> None:
    sections = {path[:-1] for path, _ in keys_of(RunConfig)}
    keys = {".".join(path) for path, _ in keys_of(RunConfig) if path not in sections and not is_free(RunConfig, path)}
    tested = {key for key, _, _ in CHANGES}
    assert tested <= keys, tested - keys
    left = sorted(key for key in keys - tested if not any(key.startswith(start) for start in ELSEWHERE))
    assert not left, f"add to CHANGES, or name the test that sees it in ELSEWHERE: {left}"
