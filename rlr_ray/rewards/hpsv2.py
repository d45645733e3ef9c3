"""Human Preference Score v2: which image people prefer for a prompt (Wu et al. 2023, arXiv:2306.09341).

A CLIP ViT-H/14 in open_clip's form; here in transformers' classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.rewards.clip import Clip, load_tokenizer
from rlr_ray.rewards.hub import Source
from rlr_ray.rewards.images import padded

_REPOSITORY, _TOKENIZER = "xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
_HEAD_WIDTHS = {"vision": 80, "text": 64}  # of ViT-H/14
_RENAMED = (  # from open_clip's names to transformers'; what only differs in its place is turned in _converted
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)


class Hpsv2(Clip):
    """The cosine of image and prompt, about 0.2 to 0.35 (papers print it times 100).

    `path`: a folder with the file of the `version`, or a repository of the hub; `tokenizer`: CLIP's, likewise.
    """

    prepared: Callable[[Tensor, int], Tensor] = staticmethod(padded)

    def __init__(self, path: str = _REPOSITORY, version: str = "2.1", tokenizer: str = _TOKENIZER):
        if str(version) not in _FILES:
            raise UserError(f"reward 'hpsv2': found version {version}; allowed: {', '.join(_FILES)}")
        file = _FILES[str(version)]
        source = Source("hpsv2", "path", path, _REPOSITORY, [file])
        weights = source.weights(source.fetched() / file)
        words = load_tokenizer("hpsv2", tokenizer, _TOKENIZER)
        super().__init__(_model(weights.get("state_dict", weights), words.eos_token_id), words)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return self.cosines(images, prompts)


def _model(weights: dict[str, Tensor], end_of_text: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    width, _, patch, _ = weights["visual.conv1.weight"].shape
    vocabulary, text_width = weights["token_embedding.weight"].shape
    vision = _sizes("vision", "visual.transformer.resblocks.", width, weights)
    vision |= {
        "patch_size": patch,
        "image_size": patch * round((len(weights["visual.positional_embedding"]) - 1) ** 0.5),
    }
    text = _sizes("text", "transformer.resblocks.", text_width, weights) | {"vocab_size": vocabulary}
    text |= {"max_position_embeddings": len(weights["positional_embedding"]), "eos_token_id": end_of_text}
    shared = weights["visual.proj"].shape[1]
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=shared))
    model.load_state_dict(dict(_converted(weights)))
    return model


def _sizes(kind: str, layers: str, width: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    numbers = {name.removeprefix(layers).split(".")[0] for name in weights if name.startswith(layers)}
    inner = len(weights[f"{layers}0.mlp.c_fc.bias"])
    heads = width // _HEAD_WIDTHS[kind]
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(numbers)}
    return sizes | {"num_attention_heads": heads, "hidden_act": "gelu"}


def _converted(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        new = name
        for pattern, replacement in _RENAMED:
            new = re.sub(pattern, replacement, new)
        if ".in_proj_" in new:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                yield new.replace("in_proj_", f"{part}_proj."), rows
        else:
            yield new, value.T if name in ("visual.proj", "text_projection") else value
