"""Where a pipeline's parts lie: all on the device, or encoders in main memory but while they encode."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from rlr_ray.models import module_bytes

_ENCODERS = ("text_encoder", "image_encoder")  # beginnings of the names of parts that only read prompts


def placed(pipeline: Any, device: torch.device, *, offload: bool) -> Any:
    """The pipeline with its parts on the device; `offload`: encoders are there only while one of them is called."""
    if not offload:
        return pipeline.to(device)
    for name, part in _modules(pipeline).items():
        if not name.startswith(_ENCODERS):
            part.to(device)
            continue
        cpu_offload_with_hook(part, device)  # so that diffusers still knows where the pipeline runs
        part.register_forward_hook(_leave)
    return pipeline


def loaded_bytes(pipeline: Any, device: torch.device) -> int:
    """Bytes of the parameters and buffers that stay on the device."""
    parts = _modules(pipeline).values()
    return sum(module_bytes(part) for part in parts if device.type == "cpu" or not hasattr(part, "_hf_hook"))


def _leave(module: nn.Module, *_: Any) -> None:
    module.to("cpu")


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
