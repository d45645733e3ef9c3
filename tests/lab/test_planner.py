"""The planner on the embedded model: memory against measured peaks, its choice, and what train makes of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import rlr_ray.lab.planner as planning
from rlr_ray.cli import main
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import load_config, parse_config
from rlr_ray.errors import UserError
from rlr_ray.lab.measure import candidate_of, estimate_batch, subject_of
from rlr_ray.lab.planner import GIB, Planner
from rlr_ray.lab.plans import covered, truncated, with_plan
from rlr_ray.lab.reference import chain_gradients, chain_squares, exact_by_step, gather
from rlr_ray.lab.report import write_choice
from rlr_ray.train.engine import Engine
from rlr_ray.utils.memory import peak_bytes
from tests.runs import RECIPE, short_run, small_run, tiny

pytestmark = pytest.mark.usefixtures("nothing_shown")
LENGTHS = (1, 2, 5)  # bench/runs/planner.py: all of 1 .. 8
SHORT = merge(RECIPE, {"model": tiny(), "sampler": {"steps": 6}})


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Which chooses once for every budget that tests ask of."""
    planner = Planner(parse_config(SHORT | {"output_dir": str(tmp_path_factory.mktemp("plan"))}), batches=8)
    planner.choose = functools.cache(planner.choose)  # type: ignore[method-assign]
    return planner


def test_peak_bytes_are_those_of_the_tensors_alive() -> None:
    """Three tensors of 1 MiB, at most two of them at once."""

    def work() -> None:
        a = torch.zeros(2**18)
        b = a + 1
        del a
        b.add_(1)
        c = b + 1
        del b, c

    assert peak_bytes(work, torch.device("cpu")) == pytest.approx(2 * 2**20, rel=1e-4)  # and a scalar or two


@pytest.mark.parametrize("checkpoint_steps", [False, True])
def test_memory_is_predicted_within_15_percent(planner: Planner, checkpoint_steps: bool) -> None:
    """First order on the last 1 .. 5 steps and sub-chains of 1 .. 5: each batch's real peak."""
    for count in LENGTHS:
        for keys in (truncated(count), covered(0, count)):
            config = with_plan(planner.config, keys | {"checkpoint_steps": checkpoint_steps})
            candidate = candidate_of("c", config, planner.subject, None, [])
            predicted = max(planner.probe.memory.parts(config.plan_shape, checkpoint_steps).values())
            measured = peak_bytes(lambda c=candidate: estimate_batch(planner.subject, c, 0), planner.engine.device)
            assert predicted == pytest.approx(measured, rel=0.15), f"{candidate.shape}"


def test_the_choice_has_the_least_price_that_fits(planner: Planner) -> None:
    by_budget = {budget: planner.choose(budget) for budget in (0.0022, 0.05, None)}
    for budget, choice in by_budget.items():
        able = [option for option in choice.options if option.can_be_chosen]
        assert choice.best in able and all(option.unbiased or option.agreement for option in able)
        assert choice.best.price == min(option.price for option in able)
        assert abs(choice.error) < 0.15
        assert all(option.fits == (budget is None or option.peak_gib <= budget) for option in choice.options)
    assert {option.name for option in by_budget[None].options} >= {"ddpo", "es", "full_bp", "alignprop, K = 3"}
    options = {option.name: option for option in by_budget[None].options}
    assert options.keys() >= {"full_bp, clipped", "forward term", "branches", "rlr"}
    assert len(planner.updates.groups) == planner.config.train.chains  # of which clipping takes the median
    assert all(options[name].beside_clipped for name in ("forward term", "rlr")) and options["rlr"].agreement
    assert planner.reference[0] in ("full backpropagation", "branches at every step")
    never = [option for option in by_budget[None].options if option.name.startswith("alignprop")]
    assert never and not any(option.can_be_chosen for option in never)  # biased, and by how much is not measured
    rule = by_budget[0.05].rule
    assert rule and 0 <= rule.length <= 5
    assert rule.memory_half_gib == planner.probe.memory.half_order.further / GIB


def test_single_chains_gradients_average_to_the_batchs(planner: Planner) -> None:
    apart = torch.cat(list(chain_gradients(planner.subject, 1)), 1)  # [T, B, P]
    torch.testing.assert_close(apart.mean(1), exact_by_step(planner.subject, 0), rtol=1e-3, atol=1e-6)
    squares = apart.double().square().sum(2)
    law = torch.tensor(chain_squares(planner.subject, 1)).double()  # [T, 2]
    torch.testing.assert_close(law, torch.stack([squares.mean(1), squares.std(1) / squares.shape[1] ** 0.5], 1))


def test_a_damped_plan_is_not_unbiased(planner: Planner) -> None:
    """Its variance is small because it hardly estimates anything."""
    damped = {"preset": "ddpo", "half_order": {"weight": 0.01}}
    config = with_plan(planner.config, damped)
    assert config.biased and not with_plan(planner.config, {"preset": "ddpo"}).biased


@pytest.mark.parametrize("steps", [1, 3])
def test_samplers_without_noise_and_with_one_step(tmp_path: Path, steps: int) -> None:
    """Half order cannot be: only backpropagation and perturbations are left."""
    full = {"preset": "full_bp", "first_order": {"steps": "all"}, "sub_chain": {"length": 0}, "rest": "none"}
    config = small_run(tmp_path, sampler={"steps": steps, "eta": 0.0}, estimator=full)
    options = Planner(config, batches=8).choose(None).options
    names = {option.name for option in options if option.unbiased}
    assert {"full_bp", "es"} <= names and not any("REINFORCE" in name or "HO" in name for name in names)


def test_a_chunk_of_one_chain_has_its_prompts_baseline(tmp_path: Path) -> None:
    engine = Engine(short_run(tmp_path, model=tiny(), sampler={"steps": 3}, train={"chunk_size": 1}))
    subject = subject_of(engine, engine.model.initial_theta)
    assert len(subject.groups) == 4
    assert math.isfinite(gather(subject, False, 8).reinforce_variance(0)[0])


def test_every_option_is_written_as_it_is(planner: Planner, tmp_path: Path) -> None:
    choice = planner.choose(None)
    for option in choice.options:
        path = write_choice(tmp_path, planner.config, dataclasses.replace(choice, best=option))
        assert load_config(str(path), []).estimator.model_copy(update={"preset": "rlr"}) == with_plan(
            planner.config, option.keys
        ).estimator.model_copy(update={"preset": "rlr"})


def test_a_budget_too_small_for_anything_says_how_much_is_needed(planner: Planner) -> None:
    with pytest.raises(UserError, match=r"memory_budget_gib is 0.001, but the least .* needs is 0\.00\d+ GiB \(\w+\)"):
        planner.choose(0.001)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planner: Planner) -> Path:
    """The planner's, whose measurements the commands take."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(SHORT | {"output_dir": "runs"}))
    monkeypatch.setattr(
        "rlr_ray.cli.plan.choose", lambda config, batches: Planner.choose(planner, config.memory_budget_gib)
    )
    return file


def test_the_plan_is_a_recipe_that_train_takes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(recipe), "--memory-budget-gib", "0.05", "--batches", "8"]) == 0
    said = capsys.readouterr().out
    assert "the paper's closed form: h* =" in said and "measured on a real update" in said
    told = json.loads(Path("plan/plan.json").read_text())
    chosen = load_config("plan/plan.yaml", ["train.iterations=1"])
    assert str(chosen.plan_shape) == told["best"]["plan"]
    assert chosen.train.chains == 8 and chosen.memory_budget_gib == 0.05
    assert main(["train", "--config", "plan/plan.yaml", "--set", "train.iterations=1"]) == 0


def test_a_runs_own_plan_is_not_written_over(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    assert main(["plan", "--config", str(recipe), "--out", "run"]) == 2
    assert "is a run's folder" in capsys.readouterr().err


def test_auto_chooses_once_and_resumes_with_its_choice(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["train", "--config", str(recipe), "--set", "estimator=measure"]
    assert main([*auto, "--dry-run"]) == 0
    assert "plan: chosen by measurement at the start" in capsys.readouterr().out
    assert main([*auto, "--set", "train.iterations=1"]) == 0
    assert "checking the memory of" in capsys.readouterr().out
    config = yaml.safe_load(Path("runs/short/config.yaml").read_text())
    told = json.loads(Path("runs/short/plan.json").read_text())
    chosen = with_plan(parse_config(SHORT | {"estimator": "measure"}), told["best"]["keys"]).estimator
    assert config["estimator"] == chosen.model_dump(mode="json")
    assert main([*auto, "--resume", "--set", "train.iterations=2"]) == 0
    assert "checking the memory of" not in capsys.readouterr().out
    assert json.loads(Path("runs/short/summary.json").read_text())["plan"] == told["best"]["plan"]
    other = ["--set", "estimator={preset: measure, half_order: {baseline: batch}}"]
    assert main(["train", "--config", str(recipe), *other, "--resume"]) == 2
    assert "was run with another config (estimator.half_order.baseline" in capsys.readouterr().err


def test_auto_with_a_black_box_reward_has_no_first_order(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlr_ray.cli.plan.choose", lambda config, batches: planning.choose(config, 8))
    monkeypatch.setattr(planning, "_LEARNED", 1)  # tests/lab/test_phases.py has a surrogate that is trusted
    changes = ["estimator=measure", "reward.differentiable=false", "train.iterations=1", "sampler.steps=3"]
    assert main(["train", "--config", str(recipe), *(word for change in changes for word in ("--set", change))]) == 0
    told = json.loads(Path("runs/short/plan.json").read_text())
    assert str(load_config("runs/short/plan.yaml", []).plan_shape) == told["best"]["plan"]
    assert "first order" not in told["best"]["plan"]
    assert all("first order" not in option["plan"] for option in told["options"])
