"""A denoiser damaged at known steps, and the range that `locate` names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from rlr_ray.cli import main
from rlr_ray.config.recipe import load_config
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Conditioning, Sampler
from rlr_ray.lab.locate import Location, bounds, forecasts, free_steps, locate
from rlr_ray.lab.measure import subject_of
from rlr_ray.train.engine import Engine

RECIPE = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
BATCHES = 3  # of 40 chains
CHAINS = ["train.chains=80", "train.chunk_size=20", "train.chains_per_prompt=8"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_config(RECIPE, ["cluster=none", *CHAINS]))


def damaged(engine: Engine, kind: str, steps: range) -> Sampler:
    """The engine's model, at `steps` deaf to the prompt, at half its output, or with a constant added to it."""
    model = engine.model
    nobody = model.encode([""])
    constant = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def denoiser(theta: Tensor, latent: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        if model.schedule.timesteps.index(timestep) not in steps:
            return model(theta, latent, timestep, conditioning)
        if kind == "deaf":
            return model(theta, latent, timestep, {**conditioning, "request": nobody["request"].expand(len(latent))})
        output = model(theta, latent, timestep, conditioning)
        return output / 2 if kind == "half" else output + 2 * constant

    return Sampler(denoiser, model.schedule)


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        ("deaf", 0, 1),
        pytest.param("deaf", 2, 3, marks=pytest.mark.slow),
        ("half", 4, 5),
        pytest.param("constant", 4, 5, marks=pytest.mark.slow),
        ("constant", 6, 7),
        pytest.param("deaf", 6, 7, marks=pytest.mark.slow),
    ],
)
def test_the_damaged_steps_are_named(engine: Engine, kind: str, first: int, last: int) -> None:
    subject = subject_of(engine, engine.model.initial_theta)
    subject = dataclasses.replace(subject, sampler=damaged(engine, kind, range(first, last + 1)))
    found = locate(forecasts(subject, BATCHES), length=2)
    assert found is not None
    assert (found.first, found.last) == (first, last)


def test_the_last_forecast_is_the_reward_of_the_picture(engine: Engine) -> None:
    subject = subject_of(engine, engine.model.initial_theta)
    rewards = forecasts(subject, 1)
    (chains, *_) = subject.batch(0)
    start = (chains.x_start, chains.noise, chains.conditioning)
    latents = engine.sampler.sample(subject.theta, *start).latents
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
    words += ["--set", "estimator.first_order.steps=0", "--out", str(tmp_path)]
    words += [word for key in CHAINS for word in ("--set", key)]
    assert main(["dcot", "locate", "--config", RECIPE, *words]) == 0
    said, told = capsys.readouterr().out, json.loads((tmp_path / "locate.json").read_text())
    assert len(told["steps"]) == 10 and told["chains"] == 120
    assert "estimator: {sub_chain: {place: [" in said and ", length: " in said and "dcot: {mid: " in said
    place = told["proposal"]["estimator"]["sub_chain"]["place"]
    assert place == [told["location"]["first"], told["location"]["last"]]


def located(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Location, *sets: str
) -> tuple[str, dict[str, Any]]:
    """What the command says of such a range, and the keys that it proposes, which the recipe must take as said."""
    monkeypatch.setattr("rlr_ray.cli.dcot.forecasts", lambda *_: torch.zeros(11, 2))
    monkeypatch.setattr("rlr_ray.cli.dcot.locate", lambda *_: found)
    words = [word for key in ("cluster=none", *sets) for word in ("--set", key)]
    assert main(["dcot", "locate", "--config", RECIPE, *words, "--out", str(folder)]) == 0
    said, told = capsys.readouterr().out, json.loads((folder / "locate.json").read_text())["proposal"]
    keys = [line for line in said.splitlines() if line.startswith(("estimator:", "dcot:"))]
    assert yaml.safe_load("\n".join(keys)) == told
    sub_chain = told.get("estimator", {}).get("sub_chain", {})
    place = [f"estimator.sub_chain.{key}={value}" for key, value in sub_chain.items()]
    if place:
        Engine(load_config(RECIPE, ["cluster=none", *sets, *place]))
    load_config(RECIPE, ["cluster=none", *sets, *place, f"dcot={told['dcot']}"])  # its prompts have no stages
    return said, told


@pytest.mark.parametrize(
    ("first", "last", "sets", "sub_chain"),
    [
        (2, 5, ["estimator.sub_chain.length=3"], {"place": [2, 5], "length": 3}),
        (4, 4, ["estimator.sub_chain.length=3"], {"place": [4, 4], "length": 1}),
        (5, 9, ["estimator.sub_chain.length=3"], {"place": [5, 5], "length": 1}),  # 6-8 are first order's
        (5, 9, ["estimator.sub_chain.length=3", "adapter.off_below=null"], {"place": [5, 6], "length": 2}),
        (5, 9, ["estimator.first_order.steps=0"], {"place": [5, 8], "length": 3}),  # 9 the base model's
        (4, 6, ["estimator.sub_chain.count=2"], {"place": [4, 5], "length": 1}),
        (4, 4, ["estimator.sub_chain.count=2"], {"place": [4, 4], "length": 1, "count": 1}),
        (2, 5, ["estimator.sub_chain.length=0"], {"place": [2, 5], "length": 3}),
        (2, 5, ["estimator.sub_chain.place=cover"], {"place": [2, 5], "length": 3}),
    ],
)
def test_a_proposed_sub_chain_loads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: int,
    last: int,
    sets: list[str],
    sub_chain: dict[str, Any],
) -> None:
    _, told = located(tmp_path, monkeypatch, capsys, Location(first, last, 1.0, True), *sets)
    assert told["estimator"]["sub_chain"] == sub_chain


@pytest.mark.parametrize(
    ("first", "sets", "words"),
    [
        (8, [], "steps 8-9 are first order's or the base model's already"),
        (2, ["estimator={preset: full_bp}"], "steps 2-9 are first order's or the base model's already"),
        (2, ["sampler.eta=0", "estimator.sub_chain.length=0"], "no noise at those of steps 2-9"),
        (2, ["estimator={preset: measure}"], "preset 'measure' chooses the plan"),
    ],
)
def test_where_there_is_no_sub_chain_to_place_it_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: int,
    sets: list[str],
    words: str,
) -> None:
    said, told = located(tmp_path, monkeypatch, capsys, Location(first, 9, 1.0, True), *sets)
    assert "no sub-chain to place there: " in said and words in said
    assert told.keys() == {"dcot"}


def test_a_sub_chain_ends_before_first_order_and_where_there_is_noise(engine: Engine) -> None:
    location = Location(4, 9, 1.0, True)
    silent = dataclasses.replace(engine.model.schedule, sigma=(*engine.model.schedule.sigma[:9], 0.0))
    assert free_steps(location, PlanShape(10, 3, 2), silent) == range(4, 7)
    assert free_steps(location, PlanShape(10, 0, 2), engine.model.schedule) == range(4, 10)
    assert free_steps(location, PlanShape(10, 0, 2), silent) == range(4, 9)
    assert not free_steps(location, PlanShape(10, 8, 2), silent)


@pytest.mark.parametrize("length", ["0", "-1", "11"])
def test_a_length_that_no_range_has_is_refused(capsys: pytest.CaptureFixture[str], length: str) -> None:
    assert main(["dcot", "locate", "--config", RECIPE, "--set", "cluster=none", "--length", length]) == 2
    assert f"--length is {length} of 10 steps; allowed: 1 to sampler.steps" in capsys.readouterr().err
