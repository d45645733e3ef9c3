"""Scores of the `image-reward` package's own classes on a tiny model, for tests/rewards/imagereward.json.

    pip install --no-deps image-reward==1.5
    python scripts/imagereward_golden.py tests/rewards/imagereward.json [SEED]

The numbers in that file come from transformers 4.30.2, for which the package was made, in an environment of its own;
with today's the script gives them too, to twelve digits. What the package takes from timm, fairscale and an old
transformers (a patch embedding, names that moved, and names that a forward pass does not use) is below, so it does not
need its requirements.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VISION = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1}
TEXT = {
    "vocab_size": 12,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "encoder_width": 64,
    "add_cross_attention": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
IDS = [[2, 4, 5, 6, 3], [2, 4, 7, 3, 0], [2, 8, 9, 1, 3]]  # of a vocabulary in which 0 pads, 1 is unknown
LONGEST = 35


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def own_classes() -> tuple[Any, Any]:
    """The package's vision and text models, without its other imports. Changes modules: for a process of its own."""
    nothing = dict.fromkeys(("_cfg", "register_model", "named_apply", "adapt_input_conv"))
    for name in ("timm", "timm.models", "timm.models.registry", "timm.models.helpers"):
        stand_in(name, **nothing)
    stand_in("timm.models.vision_transformer", PatchEmbed=PatchEmbed, _cfg=None)
    stand_in("timm.models.layers", trunc_normal_=nn.init.trunc_normal_, DropPath=nn.Identity)
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        stand_in(name)
    stand_in("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    found = importlib.util.find_spec("ImageReward")
    assert found and found.submodule_search_locations, "pip install --no-deps image-reward==1.5"
    folder = Path(found.submodule_search_locations[0])
    for name, place in (("ImageReward", folder), ("ImageReward.models", folder / "models")):
        stand_in(name, __path__=[str(place)])
    stand_in("ImageReward.models.BLIP", __path__=[str(folder / "models" / "BLIP")])
    older_transformers()
    vision = importlib.import_module("ImageReward.models.BLIP.vit").VisionTransformer
    text = importlib.import_module("ImageReward.models.BLIP.med").BertModel
    text.init_weights = lambda self: None  # transformers 5 wants preparations for it; all weights are loaded below
    return vision, text


def older_transformers() -> None:
    """What transformers 5 has moved or dropped, where the package looks for it."""
    from transformers import modeling_utils, pytorch_utils

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        vars(modeling_utils).setdefault(name, getattr(pytorch_utils, name, None))
    methods = {
        "get_head_mask": lambda self, mask, layers: [mask] * layers,  # of None
        "invert_attention_mask": lambda self, mask: (1.0 - mask[:, None, None]) * torch.finfo(torch.float32).min,
    }
    for name, method in methods.items():
        if not hasattr(modeling_utils.PreTrainedModel, name):
            setattr(modeling_utils.PreTrainedModel, name, method)


def filled(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Weights by name, the same wherever they are drawn."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in sorted(shapes.items()):
        weights[name] = 0.3 * torch.randn(shape, generator=generator) + float("orm" in name and "weight" in name)
    return weights


def head(width: int) -> nn.Sequential:
    sizes, gaps = (width, 16, 8, 4, 2, 1), (True, True, True, False, False)
    layers: list[nn.Module] = []
    for before, after, dropout in zip(sizes, sizes[1:], gaps, strict=False):
        layers += [nn.Linear(before, after), *([nn.Dropout()] if dropout else [])]
    return nn.Sequential(*layers)


def tiny_model(seed: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The package's parts under the names of its checkpoint, in float64, and the shapes of their weights."""
    from transformers import BertConfig

    vision_class, text_class = own_classes()
    parts = {
        "blip.visual_encoder": vision_class(**VISION),
        "blip.text_encoder": text_class(config=BertConfig(**TEXT), add_pooling_layer=False),
        "mlp": nn.ModuleDict({"layers": head(TEXT["hidden_size"])}),
    }
    shapes = {
        f"{prefix}.{name}": list(value.shape)
        for prefix, part in parts.items()
        for name, value in part.state_dict().items()
        if not name.endswith("position_ids")
    }
    weights = filled(shapes, seed)
    for prefix, part in parts.items():
        own = {n.removeprefix(f"{prefix}."): value for n, value in weights.items() if n.startswith(f"{prefix}.")}
        part.load_state_dict(own, strict=False)
        part.double().eval()
    return parts, shapes


def main(place: str, seed: str = "0") -> None:
    parts, shapes = tiny_model(int(seed))
    ids = torch.tensor([row + [0] * (LONGEST - len(row)) for row in IDS])
    images = torch.rand(len(IDS), 3, 32, 32, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711), dtype=torch.float64).view(3, 1, 1)
    seen = parts["blip.visual_encoder"]((images - mean) / std)
    read = parts["blip.text_encoder"](
        ids,
        attention_mask=(ids != 0).long(),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long),
        return_dict=True,
    )
    raw = parts["mlp"]["layers"](read.last_hidden_state[:, 0]).squeeze(1)
    scores = (raw - 0.16717362830052426) / 1.0333394966054072
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    golden = {
        "text": TEXT,
        "shapes": shapes,
        "scores": scores.tolist(),
        "gradient": {"norms": gradient.flatten(1).norm(dim=1).tolist(), "first": gradient[:, :, 0, 0].tolist()},
    }
    text = json.dumps(golden, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)  # a list a line
    Path(place).write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
