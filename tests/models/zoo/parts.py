"""Parts of tiny pipelines, and the table of them; sizes follow diffusers' own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from scripts.small_pipelines import clip_config
from tests.models.tiny import clip_tokenizer, tiny_vae

WORDS = ["a", "handwritten", "one", "two", "three", "seven", "eight", "ugly", "bright", "dark"]


TEXTS = ["a handwritten two", "seven", "a bright eight", "one", "three dark", "two"]


NEGATIVES = ["ugly", "dark", "", "ugly dark", "", "a"]


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any], Callable[[int], dict[str, Any]]]]] = {}


def case(function: Any) -> Any:
    def seeded() -> Any:
        torch.manual_seed(0)
        return function()

    CASES[function.__name__] = seeded
    return function


def tokenizer(length: int = 16, side: str = "right") -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    found = t.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
        padding_side=side,
    )
    found.chat_template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}"
    )
    return found


def t5(width: int = 32, kind: Any = None) -> Any:
    configs = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    if kind is t.UMT5EncoderModel:
        return t.UMT5EncoderModel(t.UMT5Config(**configs)).eval()
    return t.T5EncoderModel(t.T5Config(**configs)).eval()


def clip(**more: Any) -> Any:
    config = clip_config(clip_tokenizer(), 16)
    for key, value in more.items():
        setattr(config, key, value)
    return config


def qwen3(width: int = 16, kind: Any = None, layers: int = 2) -> Any:
    config = t.Qwen3Config(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=512,
    )
    return (kind or t.Qwen3Model)(config).eval()


def gemma2(width: int = 8) -> Any:
    config = t.Gemma2Config(
        head_dim=8,
        hidden_size=width,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="eager",
    )
    return t.Gemma2Model(config).eval()


def kl(latents: int = 4, blocks: int = 2, shift: float | None = 0.06, **more: Any) -> Any:
    return tiny_vae(latents, blocks, scaling_factor=0.6, shift_factor=shift, **more)


def shaken(pipeline: Any) -> Any:
    """Weights that are 0 at first, as last layers are, would hide everything."""
    source = torch.Generator().manual_seed(7)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for parameter in part.parameters():
                noise = torch.randn(parameter.shape, generator=source)
                parameter.data.add_(noise, alpha=0.1 if name not in ("vae", "audio_vae", "movq") else 0.03)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow(**more: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**more)


def dynamic() -> Any:
    return flow(use_dynamic_shifting=True, base_image_seq_len=16)


def ddim(**more: Any) -> Any:
    return d.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        **more,
    )


def texts(n: int) -> dict[str, Any]:
    return {"prompt": TEXTS[:n], "negative_prompt": NEGATIVES[:n]}


def only(n: int) -> dict[str, Any]:
    return {"prompt": TEXTS[:n]}


def picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def pictures(n: int, height: int = 16, width: int = 16) -> list[Image.Image]:
    return [picture(i, height, width) for i in range(n)]


def mask(height: int = 16, width: int = 16) -> Image.Image:
    pixels = numpy.zeros((height, width), numpy.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def embeddings(n: int, *shape: int, salt: int = 0) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(100 * salt + i)) for i in range(n)])
