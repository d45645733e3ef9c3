"""ImageReward: how much people would prefer an image for its prompt (Xu et al. 2023, arXiv:2304.05977).

BLIP, whose text model reads the prompt while it looks at the image, and a head. The official weights in transformers'
classes: scores and gradients are those of the `image-reward` package (tests/rewards/test_imagereward.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.rewards.hub import Source, linear_head
from rlr_ray.rewards.images import prepared

_REPOSITORY, _TOKENIZER = "zai-org/ImageReward", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's scores, from the official code
_TOKENS = 35
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_RENAMED = (  # from BLIP's own names to transformers'
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.self_attn\.proj\.", ".self_attn.projection."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
)


class ImageReward(nn.Module):
    """Scores of about mean 0 and deviation 1 over people's generations.

    `path`: a folder with ImageReward.pt and med_config.json, or a repository of the hub; `tokenizer`: BERT's, likewise.
    """

    def __init__(self, path: str = _REPOSITORY, tokenizer: str = _TOKENIZER):
        super().__init__()
        from transformers import AutoTokenizer

        files, words = ["ImageReward.pt", "med_config.json"], ["vocab.txt", "tokenizer_config.json"]
        source = Source("imagereward", "path", path, _REPOSITORY, files)
        folder = source.fetched()
        vocabulary = Source("imagereward", "tokenizer", tokenizer, _TOKENIZER, words).fetched()
        weights = source.weights(folder / "ImageReward.pt", mmap=True)
        self.tokenizer = AutoTokenizer.from_pretrained(vocabulary)
        self.vision, self.size = _vision_model(_under(_VISION, weights))
        self.text = _text_model(_under(_TEXT, weights), folder / "med_config.json", self.vision.config.hidden_size)
        self.head = linear_head(_under(_HEAD, weights))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(images.device)
        weight = self.vision.embeddings.patch_embedding.weight
        seen = self.vision(prepared(images, self.size).to(weight.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(read[:, 0]).squeeze(1) - MEAN) / STD


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _vision_model(weights: dict[str, Tensor]) -> tuple[Any, int]:
    """A vision transformer with heads of 64 numbers, as BLIP's are, and the side of its images in pixels."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    size = patch * round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_attention_heads=width // 64,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({_renamed(name): value for name, value in weights.items()})
    return model, size


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _text_model(weights: dict[str, Tensor], med_config: Path, vision_width: int) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    med = json.loads(med_config.read_text("utf-8"))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    sizes = {name: med[name] for name in (*names, "max_position_embeddings", "layer_norm_eps", "pad_token_id")}
    model = BlipTextModel(
        BlipTextConfig(**sizes, encoder_hidden_size=vision_width, is_decoder=True), add_pooling_layer=False
    )
    kept = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    missing, unknown = model.load_state_dict(kept, strict=False)
    assert not unknown and all(name.endswith("position_ids") for name in missing), (missing, unknown)
    return model
