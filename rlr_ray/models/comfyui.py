"""LoRA for programs that read tensors alone, as ComfyUI does: rank and alpha stand beside each layer's own tensors.

Such programs add alpha / rank times up @ down to a layer's weight, whatever a file's metadata says, and take alpha for
the rank where there is none. So alpha here is rank times PEFT's scaling (lora_alpha / r, or / sqrt(r) of rsLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

_FILE = "comfyui.safetensors"


def save_comfyui(modules: Mapping[str, Any], folder: Path) -> None:
    """A file for each adapted part, `comfyui.safetensors` of the first, with its name before it of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, module) in enumerate(modules.items()):
        save_file(comfyui_tensors(module, name), folder / (f"{name}.{_FILE}" if number else _FILE))


def comfyui_tensors(module: Any, part: str) -> dict[str, Tensor]:
    """Of a U-Net kohya's names, of a transformer diffusers' own; DoRA's magnitudes as `dora_scale` [out, 1, ...]."""
    tensors: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        key = f"lora_unet_{name.replace('.', '_')}" if part == "unet" else f"transformer.{name}"
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        tensors[f"{key}.lora_down.weight"] = down.detach().contiguous()
        tensors[f"{key}.lora_up.weight"] = up.detach().contiguous()
        tensors[f"{key}.alpha"] = down.new_tensor(layer.scaling["default"] * len(down)).detach()
        if "default" in layer.lora_magnitude_vector:
            scale = layer.lora_magnitude_vector["default"].weight.detach()
            tensors[f"{key}.dora_scale"] = scale.reshape(-1, *[1] * (down.dim() - 1)).contiguous()
    return tensors
