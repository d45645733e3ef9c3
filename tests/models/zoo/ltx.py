"""LTX's videos, with sound too."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.models.zoo.parts import case, dynamic, flow, picture, pictures, shaken, t5, texts, tokenizer


def ltx_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    own = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = d.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return {
        "transformer": own,
        "vae": vae,
        "scheduler": dynamic(),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }


LTX = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 9}
LTX |= {"max_sequence_length": 12}


@case
def LTXPipeline() -> Any:
    return shaken(d.LTXPipeline(**ltx_parts())), LTX | {"guidance_rescale": 0.7}, texts


@case
def LTXImageToVideoPipeline() -> Any:
    return shaken(d.LTXImageToVideoPipeline(**ltx_parts())), LTX, lambda n: texts(n) | {"image": pictures(n, 32, 32)}


@case
def LTXConditionPipeline() -> Any:
    """Draws noise for its conditions in every step of its loop."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    condition = LTXVideoCondition(image=picture(3, 32, 32), frame_index=0, strength=0.9)
    call = LTX | {"conditions": condition, "image_cond_noise_scale": 0.3}
    return shaken(d.LTXConditionPipeline(**ltx_parts() | {"scheduler": flow(shift=3.0)})), call, texts


@case
def LTX2Pipeline() -> Any:
    """Video and sound, two latents a step."""
    torch.manual_seed(0)
    width, layers = 16, 2
    own = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=width,
        rope_double_precision=False,
        rope_type="split",
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    connectors = LTX2TextConnectors(
        caption_channels=width,
        text_proj_in_factor=layers + 1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=width // 4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=width // 4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = d.AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio = d.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )
    config = t.Gemma3TextConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )
    pipeline = d.LTX2Pipeline(
        transformer=own,
        vae=vae,
        audio_vae=audio,
        scheduler=flow(),
        text_encoder=t.Gemma3TextModel(config).eval(),
        tokenizer=tokenizer(64, "left"),
        connectors=connectors,
        vocoder=vocoder,
    )
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 5}
    call |= {"frame_rate": 25.0, "max_sequence_length": 16, "use_cross_timestep": False}
    return shaken(pipeline), call, texts
