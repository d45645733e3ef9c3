"""Adapters by PEFT: what is trained inside a frozen model, as one vector theta of P numbers.

B chains.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from rlr_ray.errors import UserError, first_line

_LANGUAGE = "it is made for language models"
REFUSED = {  # PEFT's kinds that do not train here, and why
    "ADALORA": "its ranks are set by steps of a trainer's own",
    "POLY": "its layers ask which task they are at",
    "XLORA": "it mixes adapters that are trained already",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, which a denoiser has not",
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"), _LANGUAGE),
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"), _LANGUAGE),
}
# Kinds whose layers torch.func.vmap cannot run: numbers of each chain's own take a call each.
APART = {"LOHA", "OFT", "FROD", "RANDLORA", "C3A", "FOURIERFT", "SHIRA", "WAVEFT"}
_STARTS = (True, False, "gaussian", "orthogonal")  # of LoRA; others change the base's weights, or want data


def add_adapter(module: nn.Module, kind: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Freeze the module, add the adapter and return the module to call.

    LoRA is injected in place, as diffusers does, so that diffusers loads what is saved; others are wrapped as a
    PeftModel. Its parameters are float32 whatever the module's dtype; their initial values depend on `seed` alone.
    Raises UserError for a kind, an option or a target that PEFT does not take.
    """
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws from the global generator; the fork gives it back as it was
        try:
            config = _peft_config(kind, options)
            if kind == "LORA":
                peft.inject_adapter_in_model(config, module)
            else:
                module = peft.get_peft_model(module, config)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"PEFT refuses adapter {kind} with {options}: {error!r}; see PEFT's page of that adapter for its "
                f"options, and give target_modules as ends of names of layers that exist: {_layers(module)}"
            ) from error
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()
    return module.eval()


def _layers(module: nn.Module, most: int = 16) -> str:
    """Ends of the names of linear layers, attention's first: transformer_blocks.0.attn.to_out.0 -> attn.to_out.0."""
    ends: dict[str, None] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            parts = name.split(".")
            ends[".".join(parts[-3 if parts[-1].isdigit() else -2 :])] = None
    names = sorted(ends, key=lambda name: ".to_" not in name)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _peft_config(kind: str, options: dict[str, Any]) -> peft.PeftConfig:
    kinds = {str(known.value): config for known, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds or kind in REFUSED:
        why = f" ({REFUSED[kind]})" if kind in REFUSED else ""
        raise UserError(
            f"adapter.type is {kind!r}{why}; allowed: {', '.join(sorted(kinds.keys() - REFUSED))} (PEFT's names)"
        )
    allowed = {field.name for field in dataclasses.fields(kinds[kind])}
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise UserError(f"adapter has {', '.join(unknown)}; allowed for {kind}: {', '.join(sorted(allowed))}")
    if kind == "LORA":
        _check_lora(options)
    return kinds[kind](**options)


def _check_lora(options: dict[str, Any]) -> None:
    """Raise UserError for options with which a saved LoRA would not be what was trained."""
    why = {
        "bias": options.get("bias", "none") != "none" and "biases of the base are in no file of LoRA's",
        "modules_to_save": options.get("modules_to_save") and "whole modules are in no file of LoRA's",
        "lora_dropout": options.get("lora_dropout") and "chains are sampled and trained on without chance in the model",
        "init_lora_weights": options.get("init_lora_weights", True) not in _STARTS
        and f"allowed: {', '.join(map(str, _STARTS)).lower()}; others change the base's weights, which are not saved",
    }
    for name, reason in why.items():
        if reason:
            raise UserError(f"adapter.{name} is {options[name]!r}, and {reason}; leave it out")


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def set_adapter(module: nn.Module, saved: Mapping[str, Tensor], place: Path) -> None:
    """Set the adapter's parameters. Raises UserError if names or shapes are not those of the module's own adapter."""
    expected, shapes = (
        {name: list(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (peft.get_peft_model_state_dict(module), saved)
    )
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise UserError(
            f"{place} does not fit the adapter of the recipe: {len(wrong)} tensors differ, e.g. {wrong[0]}: found "
            f"{shapes.get(wrong[0], 'none')}, allowed: {expected.get(wrong[0], 'none')}; give the recipe the adapter "
            "with which it was saved"
        )
    peft.set_peft_model_state_dict(module, dict(saved))


def merged(module: Any) -> nn.Module:
    """The module that the adapter was added to, with what it adds in the weights. Raises UserError if PEFT cannot."""
    kind = module.peft_config["default"].peft_type.value
    try:
        if isinstance(module, peft.PeftModel):
            whole: nn.Module = module.merge_and_unload(safe_merge=True)
            return whole
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise UserError(
            f"PEFT puts no adapter of type {kind} into the weights that it sits in ({first_line(error)}); load it "
            "beside them, as the README.md in its folder says"
        ) from error
    recurse_remove_peft_layers(module)
    del module.peft_config
    return module


class ParameterVector:
    """The order and shapes of named tensors inside one vector theta of P numbers."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]

    def __len__(self) -> int:
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:  # [P]
        """Copy the named tensors into one vector."""
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views into theta by name, each in its own shape; gradients flow back to theta.

        Theta is [P], or [B, P]: then the views are [B, ...].
        """
        named = zip(self.shapes.items(), theta.split(self.sizes, dim=-1), strict=True)
        return {name: part.view(*theta.shape[:-1], *shape) for (name, shape), part in named}


class PerChainLinear(nn.Linear):
    """A linear layer without bias; its weight is [out, in], or [B, out, in] for inputs [B * m, ..., in].

    A chain's m rows stand together, as wherever a model folds frames or pixels into its batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return linear(input, self.weight)
        chains, rows = len(self.weight), len(input)
        assert rows % chains == 0, f"{rows} rows do not belong to {chains} chains"
        output = input.reshape(chains, -1, input.shape[-1]) @ self.weight.mT
        return output.view(*input.shape[:-1], -1)


def take_per_chain_weights(module: nn.Module) -> bool:
    """Let the LoRA layers inside take weights of each chain's own; False if some trained number is not of such layers.

    Those are LoRA on linear layers. What else PEFT has (convolutions, DoRA, biases, other adapters) has weights that
    only `torch.func.vmap` can run in one batch, at a higher price.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer) and not layer.lora_variant]
    pairs = [part for layer in layers for parts in (layer.lora_A, layer.lora_B) for part in parts.values()]
    taking = [part for part in pairs if type(part) is nn.Linear and part.bias is None]
    if {id(part.weight) for part in taking} != {id(one) for one in module.parameters() if one.requires_grad}:
        return False
    for part in taking:
        part.__class__ = PerChainLinear  # its weight stays where it is, under its name
    return True
