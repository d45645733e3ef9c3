"""Other pictures by flow matching."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.models import tiny
from tests.models.zoo.flux import FLUX
from tests.models.zoo.parts import case, embeddings, flow, gemma2, kl, shaken, t5, texts, tokenizer
from tests.models.zoo.stable import SD


@case
def SanaPipeline() -> Any:
    torch.manual_seed(0)
    own = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    scheduler = d.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=1, lower_order_final=True
    )
    pipeline = d.SanaPipeline(
        transformer=own, vae=vae, scheduler=scheduler, text_encoder=gemma2(), tokenizer=tokenizer(64)
    )
    call = SD | {"max_sequence_length": 12, "complex_human_instruction": None, "use_resolution_binning": False}
    return shaken(pipeline), call | {"height": 32, "width": 32}, texts


@case
def CogView4Pipeline() -> Any:
    torch.manual_seed(0)
    own = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    pipeline = d.CogView4Pipeline(
        transformer=own,
        vae=kl(shift=None),
        scheduler=flow(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=16, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        text_encoder=None,
        tokenizer=None,
    )
    return (
        shaken(pipeline),
        SD,
        lambda n: {
            "prompt_embeds": embeddings(n, 16, 32),
            "negative_prompt_embeds": embeddings(n, 16, 32, salt=1),
        },
    )


@case
def ChromaPipeline() -> Any:
    torch.manual_seed(0)
    own = d.ChromaTransformer2DModel(
        **tiny.FLUX, approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16
    )
    pipeline = d.ChromaPipeline(transformer=own, vae=kl(), scheduler=flow(), text_encoder=t5(), tokenizer=tokenizer())
    return shaken(pipeline), FLUX, texts


@case
def Lumina2Pipeline() -> Any:
    """Guidance left out after 60% of the steps; prompts of several lengths."""
    torch.manual_seed(0)
    own = d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    pipeline = d.Lumina2Pipeline(
        transformer=own, vae=kl(), scheduler=flow(shift=6.0), text_encoder=gemma2(), tokenizer=tokenizer(64)
    )
    call = SD | {
        "height": 32,
        "width": 64,
        "cfg_trunc_ratio": 0.6,
        "cfg_normalization": True,
        "max_sequence_length": 12,
        "system_prompt": "a",
    }
    return shaken(pipeline), call, texts


@case
def AuraFlowPipeline() -> Any:
    torch.manual_seed(0)
    own = d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    pipeline = d.AuraFlowPipeline(
        transformer=own,
        vae=kl(shift=None),
        scheduler=flow(shift=1.73),
        text_encoder=t5(kind=t.UMT5EncoderModel),
        tokenizer=tokenizer(),
    )
    return shaken(pipeline), SD | {"max_sequence_length": 12}, texts
