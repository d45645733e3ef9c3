"""A denoiser damaged at known steps, and the range that `locate` names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlr_ray.cli import main
from rlr_ray.core.chain import Conditioning, Denoiser, sample_chain
from rlr_ray.engine import Engine
from rlr_ray.lab.locate import Location, bounds, forecasts, locate
from rlr_ray.lab.subject import subject_of
from rlr_ray.recipes import load_config

RECIPE = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
BATCHES = 3  # of 40 chains


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_config(RECIPE, ["cluster=none"]))


def damaged(engine: Engine, kind: str, steps: range) -> Denoiser:
    """The engine's model, at `steps` deaf to the prompt, at half its output, or with a constant added to it."""
    model, prompts = engine.model, [prompt.text for prompt in engine.prompts]
    none = model.encode(prompts)["prompt"].mean(0, keepdim=True)
    constant = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def denoiser(theta: Tensor, latent: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        if model.schedule.timesteps.index(timestep) not in steps:
            return model(theta, latent, timestep, conditioning)
        if kind == "deaf":
            return model(theta, latent, timestep, {"prompt": none.expand_as(conditioning["prompt"])})
        output = model(theta, latent, timestep, conditioning)
        return output / 2 if kind == "half" else output + 2 * constant

    return denoiser


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [("deaf", 0, 1), ("deaf", 2, 3), ("half", 4, 5), ("constant", 4, 5), ("constant", 6, 7), ("deaf", 6, 7)],
)
def test_the_damaged_steps_are_named(engine: Engine, kind: str, first: int, last: int) -> None:
    subject = subject_of(engine, engine.model.initial_theta)
    subject = dataclasses.replace(subject, denoiser=damaged(engine, kind, range(first, last + 1)))
    found = locate(forecasts(subject, BATCHES), length=2)
    assert found is not None
    assert (found.first, found.last) == (first, last)


def test_the_last_forecast_is_the_reward_of_the_picture(engine: Engine) -> None:
    subject = subject_of(engine, engine.model.initial_theta)
    rewards = forecasts(subject, 1)
    (chains, *_) = subject.batch(0)
    start = (chains.x_start, chains.noise, chains.conditioning)
    latents = sample_chain(engine.model, subject.theta, subject.schedule, *start).latents
    with torch.no_grad():
        expected = chains.objective(latents[-1])
    torch.testing.assert_close(rewards[-1, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def promised(*means: float) -> Tensor:  # [T + 1, 50]
    noise = 0.01 * torch.randn(len(means), 50, generator=torch.Generator().manual_seed(0))
    return torch.tensor(means)[:, None] + noise


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0), (2, 3, True)),
        ((0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0), (0, 1, True)),
        ((1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0), (3, 4, False)),  # the given length
        ((1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0), (5, 5, False)),  # which ends with the chain
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), None),
    ],
)
def test_a_range_is_where_the_forecast_falls_until_it_rises(
    means: tuple[float, ...], expected: tuple[int, int, bool] | None
) -> None:
    found = locate(promised(*means), length=2)
    assert (found and (found.first, found.last, found.recovers)) == expected


@pytest.mark.parametrize("steps", [3, 4, 10, 50])
def test_bounds_make_three_stages(steps: int) -> None:
    for first in range(steps):
        for last in range(first, steps):
            found = bounds(Location(first, last, 1.0, True), steps)
            assert 0 < found["mid"] < found["fine"] < steps
            if first > 0 and last < steps - 1:
                assert (found["mid"], found["fine"]) == (first, last + 1)


def test_the_command_prints_keys_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "cluster=none", "--set", "reward.differentiable=false", "--batches", "3"]
    words += ["--set", "estimator.first_order_steps=0", "--out", str(tmp_path)]
    assert main(["dcot", "locate", "--config", RECIPE, *words]) == 0
    said, told = capsys.readouterr().out, json.loads((tmp_path / "locate.json").read_text())
    assert len(told["steps"]) == 10 and told["chains"] == 120
    assert "estimator: {sub_chain: {place: [" in said and "dcot: {mid: " in said
    place = told["proposal"]["estimator"]["sub_chain"]["place"]
    assert place == [told["location"]["first"], told["location"]["last"]]
