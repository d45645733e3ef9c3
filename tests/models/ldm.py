"""A tiny Stable Diffusion's weights under the names of the program that it was first published for (LDM)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

Names = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]
# diffusers' names -> LDM's, in turn, of a U-Net and a VAE with one layer a block
_RESNET: Names = (
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
    (r"norm1", "in_layers.0"),
    (r"conv1", "in_layers.2"),
    (r"norm2", "out_layers.0"),
    (r"conv2", "out_layers.3"),
)
_UNET: Names = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
)
_VAE: Names = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_(q|k|v)\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def _renamed(weights: dict[str, Tensor], names: Names, prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for pattern, word in names:
            name = re.sub(pattern, word, name)
        if names is _VAE and "attn_1." in name and value.dim() == 2:
            value = value[..., None, None]  # convolutions there
        renamed[prefix + name] = value.contiguous()
    return renamed


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def unet(folder: Path) -> dict[str, Tensor]:
    """Of the pipeline in the folder."""
    parts = _weights(folder, "unet")
    resnets = {name: value for name, value in parts.items() if ".resnets." in name}
    others = {name: value for name, value in parts.items() if ".resnets." not in name}
    prefix = "model.diffusion_model."
    return _renamed(resnets, (*_UNET, *_RESNET), prefix) | _renamed(others, _UNET, prefix)


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """All of the pipeline's weights."""
    text = {
        f"cond_stage_model.transformer.text_model.{name}": x for name, x in _weights(folder, "text_encoder").items()
    }
    return unet(folder) | _renamed(_weights(folder, "vae"), _VAE, "first_stage_model.") | text
