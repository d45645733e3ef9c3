"""What is trained of a pipeline: an adapter in each of some of its parts, together one vector theta of P numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import get_peft_model_state_dict, load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlr_ray.errors import UserError
from rlr_ray.models import DENOISERS
from rlr_ray.models.adapters import (
    APART,
    ParameterVector,
    add_adapter,
    merged,
    set_adapter,
    take_per_chain_weights,
    trainable,
)
from rlr_ray.models.comfyui import save_comfyui
from rlr_ray.models.lora_files import begin_from, options_of, read_lora
from rlr_ray.models.names import LORA_FILE


class Trained:
    """Adapters of one kind in some parts of a pipeline, all of which are frozen and in evaluation mode.

    LoRA is saved and loaded for diffusers' `load_lora_weights`, others in PEFT's format. theta is float32.
    """

    def __init__(self, pipeline: Any, adapter: Any, untrained: str = ""):
        self.pipeline, self.type = pipeline, adapter.type
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        parts = parts_of(pipeline, adapter)
        self.whole = parts == denoisers_of(pipeline)  # everything that steps call is trained
        begun = read_lora(pipeline, "adapter.from", adapter.from_) if adapter.from_ else {}
        if beside := sorted(begun.keys() - set(parts)):
            raise UserError(
                f"adapter.from {adapter.from_!r} has layers of {beside[0]}, where nothing is trained; allowed: of "
                f"{', '.join(parts)}; merge it instead: model.merge: {{FILE: STRENGTH}}"
            )
        self.modules: dict[str, Any] = {}  # what is called, by the part's name
        for name in parts:
            options = adapter.options_of(name) or (options_of(begun[name]) if name in begun else {})
            self.modules[name] = add_adapter(getattr(pipeline, name), adapter.type, options, adapter.seed)
        self.vectors = {name: ParameterVector(trainable(part)) for name, part in self.modules.items()}
        self._refuse(untrained)
        self.base = self.now  # [P], of the model without what training begins with
        for name, layers in begun.items():
            begin_from(self.modules[name], layers, adapter.strength, f"adapter.from {adapter.from_!r}")
        self.apart = adapter.type in APART
        self.per_chain = all([take_per_chain_weights(part) for part in self.modules.values()])

    def _refuse(self, pattern: str) -> None:
        """Raise UserError if some layer of such a name has an adapter."""
        names = [name for vector in self.vectors.values() for name in vector.shapes]
        if pattern and (wrong := [name for name in names if re.search(pattern, name)]):
            raise UserError(
                f"the adapter sits in {wrong[0]}, a layer that diffusers calls as PEFT's layers cannot be; leave it "
                "out of adapter.target_modules, e.g. [to_q, to_k, to_v, to_out.0]"
            )

    def __len__(self) -> int:  # P
        return sum(map(len, self.vectors.values()))

    @property
    def now(self) -> Tensor:  # [P]
        """The numbers that the modules themselves hold."""
        parts = [vector.flatten(trainable(self.modules[name])) for name, vector in self.vectors.items()]
        return torch.cat(parts).float()

    def of(self, part: str, theta: Tensor) -> dict[str, Tensor]:  # theta [P] or [B, P]
        """A part's tensors by their names inside it: views into theta."""
        if len(self.vectors) == 1:
            return self.vectors[part].unflatten(theta)
        own = dict(zip(self.vectors, theta.split([len(one) for one in self.vectors.values()], dim=-1), strict=True))
        return self.vectors[part].unflatten(own[part])

    def save(self, theta: Tensor, folder: Path, also: Sequence[str] = ()) -> Path:
        """Save theta: LoRA as lora/, others as adapter/; of several parts each in a folder of its own name in it.

        `also`: further formats of LoRA, `comfyui`.
        """
        for part, module in self.modules.items():
            for name, value in self.of(part, theta).items():
                module.get_parameter(name).data.copy_(value)
        if self.type != "LORA":  # `PeftModel.from_pretrained(unet, folder)` loads it, diffusers does not
            for name, part in self.modules.items():
                part.save_pretrained(self._place(folder, name))
            return folder / "adapter"
        if "comfyui" in also:
            save_comfyui(self.modules, folder / "lora")
        if not self.in_one_file:
            return self._save_parts(folder / "lora")
        ((name, part),) = self.modules.items()
        layers, told = get_peft_model_state_dict(part), _told(part)  # without the latter, alpha would be read as r
        arguments = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": told}
        self.pipeline.save_lora_weights(folder / "lora", **arguments)
        return folder / "lora" / LORA_FILE

    @property
    def in_one_file(self) -> bool:
        """Whether diffusers has a file for the pipeline's LoRA; else each part has one."""
        return len(self.modules) == 1 and hasattr(self.pipeline, "save_lora_weights")

    def load(self, folder: Path) -> Tensor:  # [P]
        """Theta as `save` left it in the folder, bit for bit. Raises UserError if it is of another adapter."""
        lora = self.type == "LORA"
        place = folder / ("lora" if lora else "adapter") / (LORA_FILE if lora and self.in_one_file else "")
        if not place.exists():
            raise UserError(
                f"{folder} holds no adapter of type {self.type} (looked for {place}); a run leaves it when it "
                "ends: go on with it by `rlr-ray train --resume`, or give the recipe the type with which it was saved"
            )
        for name, module in self.modules.items():
            saved = self._saved_lora(name, place) if lora else load_peft_weights(str(self._place(folder, name)), "cpu")
            set_adapter(module, saved, place)
        return self.now

    def merge(self) -> None:
        """Leave the pipeline its own modules, with what adapters add in their weights. Nothing is trained any more."""
        self.pipeline.register_modules(**{name: merged(module) for name, module in self.modules.items()})

    def _place(self, folder: Path, part: str) -> Path:
        return folder / "adapter" / part if len(self.modules) > 1 else folder / "adapter"

    def _saved_lora(self, part: str, place: Path) -> dict[str, Tensor]:
        """A part's LoRA in a file of diffusers. Raises UserError if it is scaled otherwise than this one."""
        if self.in_one_file:
            saved, *_, told = self.pipeline.lora_state_dict(  # between them, of some, alphas of other programs' files
                place.parent, weight_name=place.name, return_lora_metadata=True
            )
            prefix = f"{part}."
        else:
            prefix = f"{_prefix(part)}."
            with safe_open(place / part / LORA_FILE, "pt") as file:
                saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                told = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
        self._check_scaling(part, {key.removeprefix(prefix): value for key, value in (told or {}).items()}, place)
        return {key.removeprefix(prefix): value for key, value in saved.items()}

    def _save_parts(self, place: Path) -> Path:
        """A file for each part, all of whose names begin as diffusers' `load_lora_weights` takes them."""
        for name, module in self.modules.items():
            prefix = _prefix(name)
            (place / name).mkdir(parents=True, exist_ok=True)
            told = {
                f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
                for key, value in _told(module).items()
            }
            layers = {f"{prefix}.{key}": value for key, value in get_peft_model_state_dict(module).items()}
            metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(told, sort_keys=True)}
            save_file(layers, place / name / LORA_FILE, metadata)
        return place

    def _check_scaling(self, part: str, metadata: dict[str, Any], place: Path) -> None:
        """Raise UserError if a saved LoRA is scaled otherwise than this one."""
        config = self.modules[part].peft_config["default"]
        unsaid = {"lora_alpha": config.r, "use_rslora": False, "alpha_pattern": {}}  # as diffusers reads no metadata
        told = {name: metadata.get(name, value) for name, value in unsaid.items()}
        expected = {name: getattr(config, name) for name in unsaid}
        if told != expected:
            raise UserError(
                f"{place} was saved with {told}, the recipe's adapter has {expected}; give the recipe the adapter "
                "with which it was saved"
            )


def denoisers_of(pipeline: Any) -> list[str]:
    """Names of its parts that steps call. Raises UserError if there is none."""
    parts = [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]
    if not parts:
        raise UserError(f"a {type(pipeline).__name__} has no denoiser; allowed parts: {', '.join(DENOISERS)}")
    return parts


def parts_of(pipeline: Any, adapter: Any) -> list[str]:
    """Names of the parts that are trained. Raises UserError if steps call none of a name."""
    parts = denoisers_of(pipeline)
    chosen = parts if adapter.on is None else list(adapter.on)
    for name in chosen:
        if name not in parts:
            why = " (prompts are encoded once and kept, without a gradient)" if "encoder" in name else ""
            raise UserError(
                f"adapter.on names {name!r}{why}; allowed in a {type(pipeline).__name__}: {', '.join(parts)}, the "
                "parts that steps call"
            )
    return [name for name in parts if name in chosen]


def _told(module: Any) -> dict[str, Any]:
    """What is saved of an adapter beside its numbers."""
    told: dict[str, Any] = module.peft_config["default"].to_dict()
    return told


def _prefix(part: str) -> str:
    """A second expert's file is as the first's; `load_lora_weights(..., load_into_transformer_2=True)` knows them."""
    return part.removesuffix("_2")
