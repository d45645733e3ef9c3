"""Other videos."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.models.zoo.parts import CASES, case, embeddings, flow, picture, shaken, t5, texts, tokenizer


@case
def HunyuanVideoPipeline() -> Any:
    torch.manual_seed(0)
    own = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = d.AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    pipeline = d.HunyuanVideoPipeline(
        transformer=own,
        vae=vae,
        scheduler=flow(shift=7.0),
        **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
    )
    call = {"num_inference_steps": 5, "guidance_scale": 4.5, "height": 16, "width": 16, "num_frames": 9}

    def arguments(n: int) -> dict[str, Any]:
        return {
            "prompt_embeds": embeddings(n, 6, 16),
            "prompt_attention_mask": torch.ones(n, 6, dtype=torch.long),
            "pooled_prompt_embeds": embeddings(n, 8, salt=1),
        }

    return shaken(pipeline), call, arguments


@case
def HunyuanVideo15Pipeline() -> Any:
    torch.manual_seed(0)
    own = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = d.AutoencoderKLHunyuanVideo15(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipeline = d.HunyuanVideo15Pipeline(
        transformer=own,
        vae=vae,
        scheduler=flow(shift=7.0),
        guider=d.ClassifierFreeGuidance(guidance_scale=3.0),
        **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
    )

    def arguments(n: int) -> dict[str, Any]:
        found = {}
        for salt, kind in enumerate(("", "negative_")):
            found[f"{kind}prompt_embeds"] = embeddings(n, 6, 16, salt=salt)
            found[f"{kind}prompt_embeds_mask"] = torch.ones(n, 6, dtype=torch.long)
            found[f"{kind}prompt_embeds_2"] = embeddings(n, 6, 32, salt=2 + salt)
            found[f"{kind}prompt_embeds_mask_2"] = torch.ones(n, 6, dtype=torch.long)
        return found

    return shaken(pipeline), {"num_inference_steps": 5, "height": 16, "width": 16, "num_frames": 5}, arguments


@case
def CogVideoXPipeline() -> Any:
    torch.manual_seed(0)
    own = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = d.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = d.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )
    pipeline = d.CogVideoXPipeline(
        transformer=own, vae=vae, scheduler=scheduler, text_encoder=t5(), tokenizer=tokenizer()
    )
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 9}
    return shaken(pipeline), call | {"max_sequence_length": 16, "use_dynamic_cfg": True}, texts


@case
def CogVideoXImageToVideoPipeline() -> Any:
    base, call, _ = CASES["CogVideoXPipeline"]()
    own = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=False,
    )
    pipeline = d.CogVideoXImageToVideoPipeline(**base.components | {"transformer": own})
    return shaken(pipeline), call | {"image": picture(3)}, texts


@case
def MochiPipeline() -> Any:
    torch.manual_seed(0)
    own = d.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = d.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipeline = d.MochiPipeline(transformer=own, vae=vae, scheduler=flow(), text_encoder=t5(), tokenizer=tokenizer())
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 7}
    return shaken(pipeline), call | {"max_sequence_length": 16}, texts
