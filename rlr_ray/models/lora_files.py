"""LoRA that exists: files and folders in diffusers', PEFT's, kohya's and ComfyUI's styles, alphas honoured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import PeftConfig, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from rlr_ray.errors import UserError, first_line
from rlr_ray.models import DENOISERS
from rlr_ray.models.files import place_of
from rlr_ray.models.names import LORA_FILE

_NAME = "brought"  # PEFT's name of it while it is read
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")  # ends of names, one a layer
_STYLES = "a LoRA's file or folder as diffusers, PEFT, kohya's scripts or ComfyUI leave it, for this class of pipelines"

Layers = dict[str, dict[str, LoraLayer]]  # by part and by a layer's name in it


def merge_lora(pipeline: Any, key: str, path: str, strength: float) -> None:
    """Add strength times a LoRA to the weights of a pipeline's parts. Raises UserError if it does not fit them."""
    for layers in _loaded(pipeline, key, path).values():
        for layer in layers.values():
            layer.scale_layer(strength)
            layer.merge(safe_merge=True)
    _remove(pipeline)


def read_lora(pipeline: Any, key: str, path: str) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
    """A LoRA's layers by part and name: A [r, ...], B [..., r] in float32, and what scales their product.

    Raises UserError if it does not fit the pipeline's parts, or is a DoRA.
    """
    layers = _loaded(pipeline, key, path)
    if any(layer.lora_variant for part in layers.values() for layer in part.values()):
        raise UserError(f"{key} {path!r} is a DoRA, with which no training begins; merge it: model.merge: {{FILE: 1}}")
    read = {
        part: {name: (*_factors(layer), float(layer.scaling[_NAME])) for name, layer in own.items()}
        for part, own in layers.items()
    }
    _remove(pipeline)
    return read


def begin_from(
    module: nn.Module, layers: Mapping[str, tuple[Tensor, Tensor, float]], strength: float, key: str
) -> None:
    """Let a module's LoRA be strength times these layers; where its ranks are higher, the rest adds nothing yet.

    Raises UserError for a layer that the module's LoRA has not, or with a lower rank.
    """
    own = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    for name, (down, up, scaling) in layers.items():
        if name not in own:
            raise UserError(
                f"{key} has a layer {name}, which the recipe's adapter has not; leave out adapter.r, lora_alpha and "
                "target_modules, and they are the file's, or name that layer in target_modules too"
            )
        layer, rank = own[name], len(down)
        ours_down, ours_up = _factors(layer, "default")
        if rank > len(ours_down):
            raise UserError(
                f"{key} has rank {rank} at {name}, the recipe's adapter {len(ours_down)}; allowed: that rank or more; "
                "raise adapter.r, or leave it out with lora_alpha and target_modules, and they are the file's"
            )
        with torch.no_grad():
            ours_down[:rank] = down
            ours_up.zero_()
            ours_up[:, :rank] = up * (strength * scaling / layer.scaling["default"])


def options_of(layers: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Any]:
    """PEFT's options of a LoRA that has these layers and no others, each with its own rank and scaling.

    By patterns of whole names: in a list, PEFT takes names for ends of names too (`proj_out`, of every block of FLUX).
    """
    ranks = {name: len(down) for name, (down, _, _) in layers.items()}
    alphas = {name: scaling * ranks[name] for name, (_, _, scaling) in layers.items()}
    usual, alpha = max(ranks.values()), next(iter(alphas.values()))
    return {
        "target_modules": "|".join(re.escape(name) for name in sorted(layers)),
        "r": usual,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual},
        "alpha_pattern": {f"^{re.escape(name)}": one for name, one in alphas.items() if one != alpha},
    }


def _factors(layer: LoraLayer, name: str = _NAME) -> tuple[Tensor, Tensor]:
    """The layer's own A and B, which stay its own where they are float32."""
    return layer.lora_A[name].weight.data.float(), layer.lora_B[name].weight.data.float()


def _loaded(pipeline: Any, key: str, path: str) -> Layers:
    """The layers of a LoRA that diffusers and PEFT have just put into the pipeline's parts."""
    place = place_of(key, path)
    if isinstance(place, Path) and (place / "lora").is_dir():  # a run's folder
        place /= "lora"
    try:
        expected = _load(pipeline, place)
    except Exception as error:  # diffusers and PEFT raise every kind for files that they do not know
        _remove(pipeline)
        raise UserError(f"{key} {path!r} could not be read ({first_line(error)}); allowed: {_STYLES}") from error
    layers: Layers = {}
    for part, module in _modules(pipeline).items():
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and _NAME in layer.lora_A:
                layers.setdefault(part, {})[name] = layer
    count = sum(map(len, layers.values()))
    if count < max(expected, 1):
        _remove(pipeline)
        raise UserError(
            f"{key} {path!r}: {count} of its {expected} layers have a place in a {type(pipeline).__name__}; allowed: "
            f"{_STYLES}"
        )
    return layers


def _load(pipeline: Any, place: Path | str) -> int:
    """Put the LoRA into the parts; how many layers the files have, 0 if it is not known."""
    parts = {name: part for name in DENOISERS if isinstance(part := getattr(pipeline, name, None), nn.Module)}
    if isinstance(place, Path) and place.is_dir():
        folders = {name: place / name for name in parts if (place / name).is_dir()}
        if not folders and (place / "adapter_config.json").is_file():
            folders = {next(iter(parts)): place}
        for name, folder in folders.items():
            _load_part(parts[name], name, folder)
        if folders:
            return 0
        place /= LORA_FILE
    if not isinstance(place, Path):
        pipeline.load_lora_weights(place, adapter_name=_NAME)
        return 0
    tensors = load_file(place)
    read_by_us = any(name.startswith(tuple(f"{part}." for part in parts)) and _DOWN[1] in name for name in tensors)
    pipeline.load_lora_weights(_without_alphas(tensors) if read_by_us else str(place), adapter_name=_NAME)
    return sum(name.endswith(_DOWN) for name in tensors)


def _load_part(module: Any, name: str, folder: Path) -> None:
    """From a part's own folder: as PEFT saves it, or as `Trained.save` does, whose keys of a second expert are as of
    the first.
    """
    if not (folder / "adapter_config.json").is_file():
        prefix = name.removesuffix("_2")
        module.load_lora_adapter(str(folder), weight_name=LORA_FILE, prefix=prefix, adapter_name=_NAME)
        return
    told = PeftConfig.from_pretrained(str(folder)).to_dict()
    tensors = {key.removeprefix("base_model.model."): x for key, x in load_peft_weights(str(folder), "cpu").items()}
    module.load_lora_adapter(tensors, prefix=None, metadata=told, adapter_name=_NAME)


def _without_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's tensors under diffusers' names, as PEFT has them: alpha over rank is in B."""
    state: dict[str, Tensor] = {}
    for key, down in tensors.items():
        if not key.endswith(_DOWN[1]):
            continue
        name = key.removesuffix(_DOWN[1])
        if f"{name}.dora_scale" in tensors:
            raise ValueError("it is a DoRA for ComfyUI; give diffusers' file, which lies beside it")
        alpha = float(tensors.get(f"{name}.alpha", len(down)))
        state |= {
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.weight": tensors[f"{name}.lora_up.weight"] * (alpha / len(down)),
        }
    return state


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _remove(pipeline: Any) -> None:
    """Take PEFT's layers out of all parts."""
    for module in _modules(pipeline).values():
        recurse_remove_peft_layers(module)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            module.__dict__.pop(name, None)
