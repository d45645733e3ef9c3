"""Frozen weights of fewer bits, by diffusers' and transformers' own quantisation configs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig

from rlr_ray.errors import UserError
from rlr_ray.models import DENOISERS

_PACKAGES = {"torchao": "torchao", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
_WEIGHTS = "Int8WeightOnlyConfig"  # of torchao, unless `quant_type` says another


def quantized(config: Any, index: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is told of the parts whose weights are quantised as they are read.

    Raises UserError for a part that the pipeline has not or that has a file of its own, an option that the backend does
    not take, and a package that is not installed.
    """
    asked = config.quantization
    if asked is None:
        return {}
    modules = {name: entry[0] for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0]}
    parts = asked.parts or [name for name in DENOISERS if name in modules]
    files = {*modules} if isinstance(config.single_file, str) else {*(config.single_file or {})}
    if wrong := sorted((set(parts) - set(modules)) | (set(parts) & files)):
        why = "has weights in a single_file, which is not quantised" if wrong[0] in files else "is not the pipeline's"
        raise UserError(
            f"model.quantization is of {wrong[0]!r}, which {why}; allowed in model.quantization.parts: "
            f"{', '.join(sorted(set(modules) - files)) or 'none'}"
        )
    if importlib.util.find_spec(_PACKAGES[asked.backend]) is None:
        raise UserError(
            f"model.quantization.backend is {asked.backend!r}, which needs the package {_PACKAGES[asked.backend]}; "
            f"install it: pip install --no-deps {_PACKAGES[asked.backend]}"
        )
    try:
        mapping = {part: _config(asked, modules[part], config.dtype) for part in parts}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"model.quantization has {asked.options}, which {asked.backend} does not take: {error}; see diffusers' "
            "page of that backend for its options"
        ) from error
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def _config(asked: Any, library: str, dtype: str) -> Any:
    """Of a part from diffusers or transformers, which each have their own class."""
    home, options = transformers if library == "transformers" else diffusers, dict(asked.options)
    if asked.backend != "torchao":
        bits = asked.backend.removeprefix("bitsandbytes_")
        compute = {"bnb_4bit_compute_dtype": getattr(torch, dtype)} if bits == "4bit" else {}
        return home.BitsAndBytesConfig(**{f"load_in_{bits}": True, **compute, **options})
    kinds, skipped = importlib.import_module("torchao.quantization"), options.pop("modules_to_not_convert", None)
    weights = getattr(kinds, options.pop("quant_type", _WEIGHTS))(**options)
    return home.TorchAoConfig(weights, modules_to_not_convert=skipped)
