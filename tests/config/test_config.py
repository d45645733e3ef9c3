from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlr_ray.cli import main
from rlr_ray.config.estimator import KEYS, merge
from rlr_ray.config.presets import PRESETS
from rlr_ray.config.recipe import GONE, checked, load_config, parse_config, put, run_config
from rlr_ray.config.tune import TuneConfig
from rlr_ray.core.forward_term import output_weight
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.errors import UserError
from rlr_ray.lab.plans import NEUTRAL, with_plan
from rlr_ray.lab.toy import toy_schedule
from rlr_ray.train.checkpoints import changed_keys
from tests.runs import RECIPE, short_run

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_runs_dry_without_weights_or_network(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    own = {"digits": "trained: 576 numbers in unet", "moving_digits": "numbers in unet"}
    assert own.get(load_config(str(path), []).model.name, "sizes: unknown; the config files of") in said


def test_a_resolved_config_loads_as_itself(tmp_path: Path) -> None:
    config = short_run(tmp_path)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("beside", [{}, {"smoothing": 0.5, "zeroth_order": {"count": 16}}])
def test_a_config_that_is_to_choose_its_plan_loads_as_itself_and_owns_no_step(beside: dict[str, Any]) -> None:
    config = parse_config(RECIPE | {"estimator": {"preset": "measure"} | beside})
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert config.chooses_plan and not config.plan_shape.has_half_order and not config.plan_shape.has_zeroth_order
    with pytest.raises(
        UserError, match=r"'measure' chooses the plan, found rest, sub_chain.length beside it; allowed: "
    ):
        parse_config(RECIPE | {"estimator": {"preset": "measure", "rest": "half_order", "sub_chain": {"length": 1}}})


def test_a_plan_that_is_yet_to_be_chosen_refuses_nothing_that_only_other_plans_need() -> None:
    """Rewards' actors are as patient as a recipe without rollouts may have them: the laboratory looks at it too."""
    actors = {"reward": {"name": "digits", "actors": {"timeout_s": 900}}, "cluster": {}}
    alone = parse_config(RECIPE | actors | {"estimator": {"preset": "full_bp"}})
    assert with_plan(alone, NEUTRAL).rewards == alone.rewards
    for preset in ("es", "ddpo"):
        with pytest.raises(UserError, match="timeout_s is 900"):
            with_plan(alone, {"preset": preset})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_defaults_that_a_key_overrides(tmp_path: Path, preset: str) -> None:
    estimator = parse_config(
        RECIPE | {"sampler": {"steps": 10}, "estimator": {"preset": preset, "weight_averaging": 3}}
    ).estimator
    assert estimator.weight_averaging == 3
    for key, value in PRESETS[preset].items():
        found = getattr(estimator, key)
        for sub_key, sub_value in value.items() if isinstance(value, dict) else ():
            assert getattr(found, sub_key) == sub_value
        assert isinstance(value, dict) or found == value


def test_preset_rlr_paper_is_the_papers_equation_6() -> None:
    config = parse_config(RECIPE | {"estimator": {"preset": "rlr-paper"}})
    estimator, plan = config.estimator, config.plan_shape
    assert (plan.first_order_steps, plan.sub_chain_length, plan.rest) == (1, 2, "zeroth_order")
    assert estimator.zeroth_order.directions == "isotropic"
    assert estimator.half_order.weight == estimator.zeroth_order.weight == 1.0
    assert not plan.biased


def test_overrides_reach_into_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    config = load_config(
        str(file),
        ["train.learning_rate=1e-2", "estimator.sub_chain.place=[0, 2]", "cluster={rollouts: {max_actors: 3}}"],
    )
    assert config.train.learning_rate == 0.01
    assert config.train.iterations == 4  # the keys beside it stay
    assert config.estimator.sub_chain.place == (0, 2)
    assert config.cluster != "none" and config.cluster.rollouts.max_actors == 3


def test_prompts_with_a_split_come_back_from_a_resolved_config(tmp_path: Path) -> None:
    for held_out in (0.25, "hands", ["a cat"], None):
        config = short_run(tmp_path, prompts={"source": "animals", "held_out": held_out})
        assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_an_override_replaces_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    adapter = load_config(str(file), ["adapter={type: IA3, target_modules: [attn2.to_v]}"]).adapter
    assert adapter.options == {"target_modules": ["attn2.to_v"]}  # no r, no lora_alpha


def test_an_override_reaches_a_label_with_dots() -> None:
    values: dict[str, Any] = {"rewards": {"pkg.ocr:score": {"weight": 2}, "pkg": {"weight": 3}}}
    put(values, "rewards.pkg.ocr:score.weight", 1)
    put(values, "rewards.pkg.weight", 4)
    put(values, "rewards.pkg.ocr:score.options.size", 5)
    put(values, "rewards.pkg", 6)
    assert values == {"rewards": {"pkg.ocr:score": {"weight": 1, "options": {"size": 5}}, "pkg": 6}}


def test_an_override_of_a_new_label_with_dots_is_quoted() -> None:
    values: dict[str, Any] = {}
    put(values, 'rewards."pkg.ocr:score".weight', 1)
    put(values, "rewards.pkg.ocr:score.invalid", 0)
    assert values == {"rewards": {"pkg.ocr:score": {"weight": 1, "invalid": 0}}}


@pytest.mark.parametrize(
    ("was", "key", "now"),
    [
        ({"estimator": "measure"}, "estimator.smoothing", {"estimator": {"preset": "measure", "smoothing": 1}}),
        ({"reward": "digits"}, "reward.weight", {"reward": {"name": "digits", "weight": 1}}),
        ({"rewards": {"a.b": 0.5}}, "rewards.a.b.frames", {"rewards": {"a.b": {"weight": 0.5, "frames": 1}}}),
        ({"prompts": ["a", "b"]}, "prompts.held_out", {"prompts": {"source": ["a", "b"], "held_out": 1}}),
        ({"cluster": "none"}, "cluster.workers", {"cluster": {"workers": 1}}),
        ({"train": None}, "train.chains", {"train": {"chains": 1}}),
    ],
)
def test_an_override_within_a_short_form_keeps_what_it_says(was: Any, key: str, now: Any) -> None:
    put(was, key, 1)
    assert was == now


def test_an_override_within_a_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.chains.x lies in train.chains, which is 8 .* set train.chains as"):
        put({"train": {"chains": 8}}, "train.chains.x", 1)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"train": {"iteration": 3}}, ["train.iteration", "no such key", "iterations", "learning_rate"]),
    ({"iterations": 3}, ["iterations", "no such key", "train", "sampler"]),
    ({"train": {"lr-Rate": 3}}, ["train.lr-Rate: no such key", "learning_rate"]),
    ({"estimator": {"int": 3}}, ["estimator.int: no such key"]),
    ({"cluster": {"rollouts": {"Min": 3}}}, ["cluster.rollouts.Min: no such key"]),
    ({"cluster": {"actors": 3}}, ["actors", "no such key", "rollouts"]),
    ({"cluster": "local"}, ["cluster", "'local'", "none"]),
    ({"estimator": {"sub_chain": {"length": 7}}}, ["7", "T = 5", "estimator.sub_chain.length", "sampler.steps"]),
    ({"estimator": {"first_order": {"steps": 9}}}, ["9", "5", "estimator.first_order.steps"]),
    ({"estimator": {"first_order": {"steps": -1}}}, ["estimator.first_order.steps", "-1", "'all'"]),
    ({"estimator": {"first_order": {"clip": 0}}}, ["estimator.first_order.clip", "found 0", "greater than 0"]),
    ({"estimator": {"first_order": {"adjoint": "fast"}}}, ["first_order.adjoint", "'fast'", "'linear'"]),
    ({"estimator": {"checkpoint_steps": "maybe"}}, ["estimator.checkpoint_steps", "'maybe'", "valid boolean"]),
    ({"estimator": {"half_order": {"score": "paths"}}}, ["half_order.score", "'paths'", "'branches' or 'forward'"]),
    ({"estimator": {"half_order": {"baseline": "mean"}}}, ["half_order.baseline", "'mean'", "'running'"]),
    ({"estimator": {"half_order": {"branch_steps": 0}}}, ["half_order.branch_steps", "found 0", "'all'"]),
    ({"estimator": {"half_order": {"draws": 0}}}, ["half_order.draws", "found 0", "or equal to 1"]),
    ({"estimator": {"half_order": {"signal": [0.4, 0.03]}}}, ["half_order.signal", "[0.4, 0.03]", "low < high"]),
    ({"estimator": {"half_order": {"signal": [0.03, 1]}}}, ["half_order.signal", "found 1", "less than 1"]),
    ({"estimator": {"half_order": {"weighting": "snr"}}}, ["half_order.weighting", "'snr'", "'elbo'"]),
    ({"estimator": {"half_order": {"pull": -1}}}, ["half_order.pull", "found -1", "or equal to 0"]),
    ({"estimator": {"half_order": {"pull_to": "mean"}}}, ["half_order.pull_to", "'mean'", "'ema' or 'base'"]),
    ({"estimator": {"zeroth_order": {"clip": 0}}}, ["estimator.zeroth_order.clip", "found 0", "greater than 0"]),
    ({"estimator": {"surrogate": {"use": "both"}}}, ["surrogate.use", "'both'", "'switch' or 'residual'"]),
    ({"estimator": {"surrogate": {"trust": 1}}}, ["surrogate.trust", "found 1", "less than 1"]),
    ({"estimator": {"surrogate": {"features": "clip"}}}, ["surrogate.features", "'clip'", "'denoiser'"]),
    (
        {"estimator": {"half_order": {"score": "forward"}, "rest": "half_order"}},
        ["estimator.half_order.score 'forward'", "estimator.rest to none", "path or branches"],
    ),
    (
        {"estimator": {"first_order": {"adjoint": "linear"}, "rest": "none", "truncation": "random"}},
        ["estimator.first_order.adjoint 'linear'", "estimator.truncation to fixed"],
    ),
    (
        {"estimator": {"surrogate": {"name": "digits"}}, "reward": {"differentiable": False}},
        ["estimator.surrogate.use 'switch'", "'digits'", "name: online, or use: residual"],
    ),
    (
        {"estimator": {"half_order": {"score": "forward", "pull": 1}}, "guards": {"ema": None}},
        ["half_order.pull", "guards.ema, e.g. 0.95", "pull_to: base"],
    ),
    ({"reward": {"gradient": "none"}}, ["gradient", "'none'", "'own' or 'surrogate'"]),
    (
        {"model": {"differentiable": False}},
        ["model.differentiable is false", "first order, half order", "preset: auto or es", "differentiable: true"],
    ),
    ({"model": {"differentiable": "perhaps"}}, ["model.differentiable", "'perhaps'", "valid boolean"]),
    ({"estimator": {"sub_chain": {"place": [3, 1]}}}, ["estimator.sub_chain.place", "[3, 1]"]),
    ({"prompts": []}, ["prompts", "found []", "at least 1"]),
    ({"prompts": {"sauce": "a.txt"}}, ["prompts.sauce", "no such key", "held_out, source"]),
    ({"prompts": {"source": "a.txt", "held_out": 1.5}}, ["prompts.held_out", "found 1.5", "less than 1"]),
    ({"prompts": {"source": "a.txt", "held_out": 0}}, ["prompts.held_out", "found 0", "greater than 0"]),
    ({"sampler": {"eta": 0}}, ["sampler.eta is 0", "half order", "sampler.eta: 1"]),
    ({"sampler": {"eta": [1, 1], "steps": 3}}, ["eta has 2 values", "steps: 3", "one a step"]),
    ({"sampler": {"noisy_steps": [2, 3], "steps": 3}}, ["noisy_steps is [2, 3]", "last <= 2"]),
    ({"sampler": {"eta": 2}}, ["sampler.eta", "2", "less than or equal to 1"]),
    ({"estimator": {"zeroth_order": {"scale": 0}}}, ["estimator.zeroth_order.scale", "found 0", "greater than 0"]),
    ({"estimator": {"zeroth_order": {"count": 9}}}, ["9", "multiple of chunk_size 4"]),
    ({"estimator": {"preset": "drlr"}}, ["estimator.preset", "'drlr'", "rlr-paper"]),
    ({"train": {"chunk_size": 3}}, ["chains 8", "multiple of chunk_size 3"]),
    ({"train": {"chunk_size": 8}}, ["auto", "train.chunk_size", "weight to 1"]),
    ({"train": {"chains_per_prompt": 1}}, ["chains_per_prompt", "'batch'"]),
    (
        {"train": {"group_size": 2, "chains_per_prompt": 1}},
        ["group_size 2", "estimator.half_order.baseline", "'prompt'", "leave out one"],
    ),
    (
        {"train": {"group_size": 2, "chains_per_prompt": 4}, "estimator": {"half_order": {"baseline": "group"}}},
        ["group_size 2", "train.chains_per_prompt", "found 4"],
    ),
    (
        {"train": {"group_size": 1, "chains_per_prompt": 1}, "estimator": {"half_order": {"baseline": "group"}}},
        ["'group' needs 2 chains", "found 1", "raise train.chains_per_prompt"],
    ),
    ({"estimator": {"zeroth_order": {"count": 1, "chunk_size": 1}}}, ["auto", "found one", "weight to 1"]),
    (
        {"estimator": {"first_order": {"steps": 0}, "sub_chain": {"length": 0}}},
        ["'guided' follows", "directions: isotropic"],
    ),
    (
        {"estimator": {"first_order": {"steps": 0}, "sub_chain": {"length": 0}, "rest": "none"}},
        ["leaves every step out", "estimator.rest: half_order"],
    ),
    (
        {"train": {"ahead": 1}, "estimator": {"first_order": {"steps": "all"}, "sub_chain": {"length": 0}}},
        ["train.ahead is 1", "nothing is sampled ahead", "estimator.first_order.steps"],
    ),
    ({"train": {"betas": [1.5, 0.9]}}, ["train.betas.0", "1.5", "less than 1"]),
    ({"train": {"learning_rate": float("inf")}}, ["train.learning_rate", "finite"]),
    ({"estimator": {"half_order": {"weight": -1}}}, ["half_order.weight", "-1", "'auto'", "or equal to 0"]),
    ({"cluster": {"workers": 0}}, ["cluster.workers", "found 0", "or equal to 1"]),
    ({"cluster": {"workers": 5}}, ["cluster.workers is 5", "allowed: 1 to 2"]),
    ({"cluster": {"workers": 3}, "train": {"sampling_size": 5}}, ["allowed: 1 to 2", "or train.sampling_size"]),
    ({"cluster": {"workers": 2, "worker": {"gpus": 0.5}}}, ["0.5 for 2 workers", "NCCL"]),
    (
        {"cluster": {"worker": {"shard": True}}, "adapter": {"type": "OFT"}},
        ["cluster.worker.shard is true", "adapter.type is 'OFT'", "set adapter.type: LORA"],
    ),
    ({"cluster": {"worker": {"shard": True}}, "model": {"compile": True}}, ["shard is true", "model.compile: false"]),
    ({"cluster": {"worker": {"shard": True}}, "model": {"quantization": {"backend": "torchao"}}}, ["cannot be cut"]),
    ({"cluster": {"worker": {"shard": True}}, "adapter": {"use_dora": True}}, ["shard is true", "adapter.use_dora"]),
    ({"cluster": {"worker": {"shard": True}}, "estimator": "measure"}, ["shard is true", "'measure'", "preset: auto"]),
    ({"device": "cpu", "cluster": {"worker": {"gpus": 1}}}, ["device is 'cpu'", "cluster.worker.gpus is 1"]),
    ({"name": ".."}, ["name", "'..'"]),
    ({"train": {"learning_rate": "fast"}}, ["train.learning_rate", "'fast'", "number"]),
    ({"prompts": [""]}, ["prompts"]),
    ({"name": "a/b"}, ["name", "'a/b'"]),
    ({"device": "cuda", "cluster": {}}, ["device is 'cuda'", "cluster.worker.gpus is 0", "device: auto"]),
    ({"device": "gpu"}, ["device", "'gpu'", "'cuda'"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_bad_value_is_refused_with_its_key_and_what_is_allowed(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        short_run(tmp_path, **changes)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("gone", GONE)
def test_a_key_that_is_no_more_is_refused_with_what_to_write(tmp_path: Path, gone: str) -> None:
    key, _, value = gone.partition("=")
    values: dict[str, Any] = {"rewards": {"digits": {}}, "evaluation": {"judges": {"digits_judge": {}}}}
    label = "digits" if key.startswith("rewards") else "digits_judge"
    put(values, key.replace("*", label), value or 1)
    with pytest.raises(UserError) as error:
        if key.split(".")[0] in TuneConfig.model_fields or key == "closed_form":
            search = {"name": "a", "base": "a", "budgets_gib": [1], "cost": {"seconds": 1}}
            del values["rewards"], values["evaluation"]
            checked(TuneConfig, search | {"space": {"train.chains": {"choice": [1]}}} | values)
        else:
            short_run(tmp_path, reward=None, **merge(values, {"evaluation": {"judge": None}}))
    assert str(error.value) == f"{gone.replace('=', ': ')} is no more: {GONE[gone]}"


def test_a_run_that_an_earlier_version_left_is_read_without_the_keys_that_are_gone(tmp_path: Path) -> None:
    """It wrote every key that there was, asked or not; so `evaluate` and `sample` go on with it."""
    config = short_run(tmp_path, cluster={}, reward={"name": "digits", "actors": {}})
    values = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    put(values, "estimator.sub_chain.temperature", 1.0)
    put(values, "rewards.digits.actors.batch_wait_s", 0.01)
    put(values, "cluster.resize_every_s", 60)
    put(values, "cluster.rollouts.max_retries", 4)
    estimator = values["estimator"] | {"preset": "rlr"}
    values["estimator"] = estimator | {"first_order_steps": estimator.pop("first_order")["steps"]}
    assert changed_keys(values, config) == []
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert run_config(config.folder, []) == config


def test_a_run_of_an_earlier_version_had_its_adapter_on_at_every_step(tmp_path: Path) -> None:
    config = short_run(tmp_path)
    values = config.model_dump(mode="json")
    assert values["adapter"].pop("off_below") == "auto"
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert run_config(config.folder, []).adapter.off_below is None


@pytest.mark.parametrize(("value", "off"), [("auto", 1), (0.2, 1), (0.1, 0), (None, 0)])
def test_steps_that_run_without_the_adapter_follow_their_key(tmp_path: Path, value: Any, off: int) -> None:
    """Of ten steps the last has 8.8 times the kappa of the one before; PEFT is not told of the key."""
    adapter = short_run(tmp_path, adapter={"off_below": value}).adapter
    assert adapter.steps_off(toy_schedule(10)) == off and "off_below" not in adapter.options


@pytest.mark.parametrize("value", [0, 1, -0.1, "last"])
def test_a_part_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"adapter\.off_below: found .*auto"):
        short_run(tmp_path, adapter={"off_below": value})


def test_what_yaml_takes_for_no_number_is_one(tmp_path: Path) -> None:
    options = yaml.safe_load("{eps: 1e-8, fused: false, name: a}")
    assert isinstance(options["eps"], str)
    train = short_run(tmp_path, train={"optimizer_options": options}).train
    assert train.optimizer_options == {"eps": 1e-8, "fused": False, "name": "a"}


def test_every_bad_key_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        short_run(tmp_path, train={"iterations": 0}, sampler={"steps": 0})
    assert "train.iterations" in str(error.value) and "sampler.steps" in str(error.value)


@pytest.mark.parametrize(
    ("content", "overrides", "words"),
    [
        (None, [], ["not found"]),
        ("a: [", [], ["not YAML"]),
        ("- a", [], ["list", "keys and values"]),
        ("name: a", ["train.iterations"], ["train.iterations", "--set key.sub=value"]),
        ("name: a", ["train={a: ["], ["not YAML"]),
    ],
)
def test_a_bad_file_or_override_is_refused(
    tmp_path: Path, content: str | None, overrides: list[str], words: list[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(str(file), overrides)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_what_the_core_refuses_is_told_in_keys() -> None:
    """Every parameter of a plan that it names has its key; it knows none itself."""
    core = "".join(path.read_text("utf-8") for path in (ROOT / "rlr_ray" / "core").glob("*.py"))
    assert not re.search(r"(estimator|train|sampler|guards|cluster)\.[a-z_]+(:|\b above| or |;)", core)
    source = inspect.getsource(PlanShape) + inspect.getsource(output_weight)
    messages = re.findall(r"raise UserError\((.*?)\n *\)\n", source, re.S)
    assert len(messages) > 5 and {name for text in messages for name in re.findall("`(.+?)`", text)} == set(KEYS)
    keys = {"first_order": {"steps": 9}, "sub_chain": {"length": 0}, "rest": "none"}
    with pytest.raises(UserError, match=r"^estimator.first_order.steps is 9; allowed: 0 to sampler.steps \(5\)$"):
        short_run(Path(), estimator=keys)
