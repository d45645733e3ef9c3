"""LoRA that exists, in every style that people have it: what is merged or begun with is what plain diffusers draws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.models.fused import save_fused
from rlr_ray.models.lora_files import options_of
from rlr_ray.models.sizes import sizes_of
from tests.models.common import begun, calls, drawn, model_of, some_theta
from tests.models.tiny import save_flux, save_wan
from tests.runs import small_run, tiny, train_here

OPTIONS: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0"]}
LORA = {"type": "LORA", **OPTIONS}
SAMPLER = {"steps": 3, "guidance_scale": 1.0, "eta": 0.0}
PROMPTS = ["a handwritten two"]
SIZE = {"height": 16, "width": 16}


def load(adapter: dict[str, Any], **keys: Any) -> Any:
    return model_of("stable_diffusion", tiny()["path"], {"off_below": None, **adapter}, SAMPLER, **keys)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same LoRA in each style, and as a run's folder."""
    folder = tmp_path_factory.mktemp("styles")
    model = load(LORA)
    model.save_adapter(some_theta(model), folder / "run", also=["comfyui"])
    peft = get_peft_model(DiffusionPipeline.from_pretrained(tiny()["path"]).unet, LoraConfig(**OPTIONS))
    own = load_file(folder / "run" / "lora" / "pytorch_lora_weights.safetensors")
    for name, parameter in peft.named_parameters():
        key = name.replace("base_model.model.", "unet.").replace(".default", "")
        if key in own:
            parameter.data = own[key]
    peft.save_pretrained(folder / "peft")
    lora = folder / "run" / "lora"
    diffusers = lora / "pytorch_lora_weights.safetensors"
    return {
        "run": folder / "run",
        "diffusers": diffusers,
        "kohya": lora / "comfyui.safetensors",
        "peft": folder / "peft",
    }


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> Tensor:
    model = load(LORA)
    return drawn(model, model.load_adapter(files["run"]), PROMPTS)


def test_the_adapter_has_the_files_layers_and_no_others() -> None:
    """`proj_out` of the whole is not every block's, nor is a dot any letter; each with its rank."""
    linear = {name: torch.nn.Linear(4, 4) for name in ("proj_out", "blocks_proj_out")}
    module = torch.nn.ModuleDict({**linear, "blocks": torch.nn.ModuleDict({"proj_out": torch.nn.Linear(4, 4)})})
    layers = {"proj_out": 1, "blocks.proj_out": 3}
    for chosen in ({"proj_out": 1}, {"blocks.proj_out": 3}, layers):
        of = {name: (torch.zeros(rank, 4), torch.zeros(4, rank), 2.0 * rank) for name, rank in chosen.items()}
        adapted = get_peft_model(copy.deepcopy(module), LoraConfig(**options_of(of))).base_model.model
        found = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
        assert {name: layer.r["default"] for name, layer in found.items()} == chosen
        assert all(layer.scaling["default"] == 2 * chosen[name] for name, layer in found.items())


@pytest.mark.parametrize("style", ["run", "diffusers", "kohya", "peft"])
def test_a_style_is_begun_with_and_merged(style: str, files: dict[str, Path], expected: Tensor) -> None:
    """By its own ranks and alphas, at twice the rank and another alpha, and in the weights."""
    own, wider = load({"from": str(files[style])}), load({"from": str(files[style]), **LORA, "r": 4, "lora_alpha": 3})
    merged = load({"type": "LORA", "r": 1, "target_modules": ["to_k"]}, merge={str(files[style]): 1.0})
    base = drawn(load(LORA), own.base_theta, PROMPTS)
    for model in (own, wider, merged):
        torch.testing.assert_close(drawn(model, model.initial_theta, PROMPTS), expected, atol=3e-6, rtol=0)
    for model in (own, wider):
        torch.testing.assert_close(drawn(model, model.base_theta, PROMPTS), base, atol=0, rtol=0)
    assert (expected - base).abs().max() > 1e-3


def test_strength_scales_what_is_begun_with_and_merged(files: dict[str, Path]) -> None:
    """Against plain diffusers with the LoRA at that strength; another strength draws another picture."""
    pictures = []
    for strength in (0.5, -1.0):
        started = load({"from": str(files["diffusers"]), "strength": strength})
        merged = load({"type": "LORA", "r": 1, "target_modules": ["to_k"]}, merge={str(files["kohya"]): strength})
        plain = load(LORA)
        theta = plain.load_adapter(files["run"])
        for name, value in plain.tuned.of("unet", theta).items():
            if "lora_B" in name:
                value *= strength
        pictures.append(drawn(plain, theta, PROMPTS))
        for model in (started, merged):
            torch.testing.assert_close(drawn(model, model.initial_theta, PROMPTS), pictures[-1], atol=3e-6, rtol=0)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_comfyuis_names_of_a_transformer(tmp_path: Path) -> None:
    save_flux(tmp_path / "base")
    keys = {**SIZE, "call": calls("flux")}
    lora = {"type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["attn.to_q", "attn.to_k"]}
    model = model_of("flux", tmp_path / "base", lora, SAMPLER, **keys)
    theta = some_theta(model, 1.0)
    model.save_adapter(theta, tmp_path, also=["comfyui"])
    again = model_of(
        "flux", tmp_path / "base", {"from": str(tmp_path / "lora" / "comfyui.safetensors")}, SAMPLER, **keys
    )
    expected = drawn(model, theta, PROMPTS)
    torch.testing.assert_close(drawn(again, again.initial_theta, PROMPTS), expected, atol=3e-6, rtol=0)
    assert (drawn(model, model.initial_theta, PROMPTS) - expected).abs().max() > 1e-4


def test_each_expert_has_its_own_ranks_and_may_be_left_out(tmp_path: Path) -> None:
    save_wan(tmp_path / "base", second=True)
    keys = {**SIZE, "num_frames": 5, "call": calls("wan")}
    lora = {"type": "LORA", "r": 2, "target_modules": ["to_q", "to_v"]}
    on: dict[str, Any] = {"transformer": {}, "transformer_2": {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}}
    both = model_of("wan", tmp_path / "base", lora | {"on": on}, SAMPLER, **keys)
    ranks = {
        part: {len(value) for name, value in both.tuned.of(part, both.initial_theta).items() if "lora_A" in name}
        for part in on
    }
    assert ranks == {"transformer": {2}, "transformer_2": {4}}
    theta = some_theta(both, 1.0)
    both.save_adapter(theta, tmp_path)
    again = model_of("wan", tmp_path / "base", {"from": str(tmp_path)}, SAMPLER, **keys)
    torch.testing.assert_close(
        drawn(again, again.initial_theta, PROMPTS), drawn(both, theta, PROMPTS), atol=3e-6, rtol=0
    )
    with pytest.raises(UserError, match=r"layers of transformer_2, where nothing is trained; allowed: of transformer;"):
        model_of("wan", tmp_path / "base", {"from": str(tmp_path), "on": ["transformer"]}, SAMPLER, **keys)


def test_one_expert_alone_is_trained(tmp_path: Path) -> None:
    """A step of the other one has gradient 0, and the whole chain's is that of the expert's own steps."""
    save_wan(tmp_path / "base", second=True)
    lora = {"type": "LORA", "r": 2, "target_modules": ["to_q", "to_v"], "on": ["transformer"]}
    model = model_of("wan", tmp_path / "base", lora, SAMPLER, **SIZE, num_frames=5, call=calls("wan"))
    theta, start = some_theta(model, 1.0).requires_grad_(), begun(model, PROMPTS)
    gradients = [
        torch.autograd.grad(model(theta, start[0], time, start[2]).square().sum(), theta)[0].abs().max()
        for time in model.schedule.timesteps
    ]
    assert [bool(one) for one in gradients] == [time >= 900 for time in model.schedule.timesteps]
    assert any(gradients) and not all(gradients)
    model.save_adapter(theta.detach(), tmp_path)
    assert torch.equal(model.load_adapter(tmp_path), theta.detach())


def test_what_does_not_fit_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = str(files["diffusers"])
    for adapter, words in (
        ({"from": path, **LORA, "r": 1}, r"has rank 2 at .*, the recipe's adapter 1; allowed"),
        ({"from": path, **LORA, "target_modules": ["to_q"]}, r"has a layer .*to_out\.0, which the recipe's adapter"),
        ({"from": "nowhere/at/all"}, r"adapter\.from 'nowhere/at/all': there is no such folder"),
        ({**LORA, "on": ["text_encoder"]}, r"adapter\.on names 'text_encoder' \(prompts are .*; allowed in a .*: unet"),
    ):
        with pytest.raises(UserError, match=words):
            load(adapter)
    save_file({f"other.{key}": value for key, value in load_file(path).items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"model\.merge .*(could not be read|0 of its \d+ layers have a place)"):
        load(LORA, merge={str(tmp_path / "other.safetensors"): 1.0})
    for adapter, words in (
        ({"strength": 0.5}, "there is no adapter.from"),
        ({"type": "IA3", "from": "x"}, "is for adap"),
    ):
        with pytest.raises(UserError, match=words):
            small_run(tmp_path, adapter=adapter)


def test_a_run_goes_on_from_another_and_its_files_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    """Training begins at the file's numbers; its sizes are known without weights; fused, merges are in the weights."""
    adapter = {"from": str(files["run"]), "off_below": None}
    values = small_run(tmp_path, train={"iterations": 1, "learning_rate": 1e-9}).model_dump(mode="json")
    model = values["model"] | {"merge": {str(files["kohya"]): 0.5}}
    config: RunConfig = parse_config(values | {"adapter": adapter, "model": model})
    assert config.model_dump(mode="json")["adapter"]["from"] == adapter["from"]
    folder = train_here(config)
    assert {"adapter.from", f"model.merge {files['kohya']}"} <= folder.contents.keys()
    trained = load({**adapter}, merge=model["merge"])
    theta = trained.load_adapter(folder.path)
    torch.testing.assert_close(theta, trained.initial_theta, atol=1e-6, rtol=0)
    assert sizes_of(config).trained == len(theta)
    save_fused(config.model, config.adapter, folder.path, tmp_path / "whole")
    whole = model_of("auto", tmp_path / "whole", LORA, SAMPLER)
    torch.testing.assert_close(
        drawn(whole, whole.initial_theta, PROMPTS), drawn(trained, theta, PROMPTS), atol=3e-6, rtol=0
    )
