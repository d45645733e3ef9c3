"""Parts of small pipelines with random weights: some are trained into the embedded models, others drawn on in tests."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_WIDTH = 16  # of each of Stable Diffusion 3's two CLIP encoders; its transformer sees both side by side


def clip_config(
    tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, *, inner: int = 16, layers: int = 2, heads: int = 2
) -> CLIPTextConfig:
    """Of a text encoder for the tokenizer's words; `inner` is the width of its feed-forward layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer(words: Sequence[str], length: int) -> T5Tokenizer:
    """Of whole words, which takes `length` tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    sizes = {"d_model": 2 * TEXT_WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()


def sd3_transformer(size: int, *, layers: int, heads: int, head: int, **options: object) -> SD3Transformer2DModel:
    """Stable Diffusion 3's, for latents [4, size, size] and these encoders; `head`: numbers of an attention head."""
    return SD3Transformer2DModel(
        sample_size=size,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=heads * head,
        pooled_projection_dim=2 * TEXT_WIDTH,
        out_channels=4,
        pos_embed_max_size=size,
        qk_norm="rms_norm",
        **options,
    )


def stable_diffusion_3(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    text: CLIPTextConfig,
    tokenizers: tuple[CLIPTokenizer, T5Tokenizer | None],
    shift: float,
) -> StableDiffusion3Pipeline:
    """With text encoders of random weights; without T5 the pipeline attends to zeros in its place."""
    clip, t5 = tokenizers
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=clip,
        text_encoder_3=None if t5 is None else t5_encoder(t5),
        tokenizer_3=t5,
    )
