"""Video pipelines."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from tests.sweep import parts
from tests.sweep.case import Case
from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.weights import randomize

_W = encoders.WIDTH


_SIZE = {"height": 32, "width": 32}


_SHORT = {**_SIZE, "guidance_scale": 5.0, "max_sequence_length": 32, "num_frames": 9}


_pipe = functools.partial(parts.pipe, seed=401)


def _allegro() -> DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=_W,
    )
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.5,
    )
    vae.enable_tiling()
    return _pipe("AllegroPipeline", transformer, scheduler=parts.ddim(), vae=randomize(vae, 402), **parts.t5())


_WAN_LIKE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": _W,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def _anyflow(far: bool) -> DiffusionPipeline:
    gates = {"gate_value": 0.25, "deltatime_type": "r"}
    chunks = {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "chunk_partition": (1, 1, 1)} if far else {}
    kind = diffusers.AnyFlowFARTransformer3DModel if far else diffusers.AnyFlowTransformer3DModel
    return _pipe(
        "AnyFlowFARPipeline" if far else "AnyFlowPipeline",
        kind(**_WAN_LIKE | gates | chunks),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
        vae=parts.wan_vae(),
        **parts.umt5(),
    )


def _cogvideox() -> DiffusionPipeline:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=_W,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=32,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.5,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return _pipe("CogVideoXPipeline", transformer, scheduler=scheduler, vae=randomize(vae, 403), **parts.t5())


def _cosmos() -> DiffusionPipeline:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return _pipe(
        "CosmosTextToWorldPipeline",
        parts.cosmos_transformer(),
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, num_train_timesteps=1000, final_sigmas_type="sigma_min"
        ),
        vae=randomize(vae, 404),
        safety_checker=parts.SilentChecker(),
        **parts.t5(),
    )


def _latte() -> DiffusionPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=_W,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    return _pipe(
        "LattePipeline", transformer, scheduler=parts.ddim(), vae=vaes.kl(4, shift=None, scale=0.5), **parts.t5(120)
    )


def _mochi() -> DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=_W,
        time_embed_dim=8,
        activation_fn="swiglu",
        max_sequence_length=32,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return _pipe("MochiPipeline", transformer, vae=randomize(vae, 409), **parts.t5())


def _skyreels(name: str) -> DiffusionPipeline:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**_WAN_LIKE, qk_norm="rms_norm_across_heads")
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return _pipe(name, transformer, scheduler=scheduler, vae=parts.wan_vae(), **parts.umt5())


def _text_to_video_sd() -> DiffusionPipeline:
    tokenizer = tokenizers.clip()
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=_W,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return diffusers.TextToVideoSDPipeline(
        unet=randomize(unet, 411),
        scheduler=parts.ddim(),
        vae=vaes.kl(4, shift=None, scale=0.5),
        text_encoder=encoders.clip(tokenizer),
        tokenizer=tokenizer,
    )


CASES = tuple(
    Case(kind="video", **case)
    for case in (
        {
            "pipeline": "AllegroPipeline",
            "build": _allegro,
            "call": {**_SHORT, "num_frames": 8, "clean_caption": False},
            "output_type": "latent",
        },
        {"pipeline": "AnyFlowPipeline", "double": True, "build": lambda: _anyflow(False), "call": _SHORT},
        {"pipeline": "AnyFlowFARPipeline", "build": lambda: _anyflow(True), "call": _SHORT},
        {"pipeline": "CogVideoXPipeline", "double": True, "build": _cogvideox, "call": _SHORT},
        {"pipeline": "CosmosTextToWorldPipeline", "build": _cosmos, "call": _SHORT},
        {
            "pipeline": "LattePipeline",
            "build": _latte,
            "call": {**_SIZE, "guidance_scale": 5.0, "video_length": 4, "clean_caption": False},
        },
        {"pipeline": "MochiPipeline", "build": _mochi, "call": {**_SHORT, "num_frames": 7}},
        {"pipeline": "SkyReelsV2Pipeline", "build": lambda: _skyreels("SkyReelsV2Pipeline"), "call": _SHORT},
        {
            "pipeline": "SkyReelsV2DiffusionForcingPipeline",
            "build": lambda: _skyreels("SkyReelsV2DiffusionForcingPipeline"),
            "call": {**_SHORT, "num_frames": 9, "base_num_frames": 9, "addnoise_condition": 20},
        },
        {
            "pipeline": "TextToVideoSDPipeline",
            "double": True,
            "build": _text_to_video_sd,
            "call": {**_SIZE, "guidance_scale": 5.0, "num_frames": 4},
        },
    )
)
