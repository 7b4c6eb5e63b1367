"""Tiny autoencoders of videos, of diffusers' classes."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)
from torch import nn

from tests.tiny.weights import randomize


def wan(**config: Any) -> nn.Module:
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], **config
    )
    return randomize(vae, 3)


def wan_in_patches() -> nn.Module:
    return wan(patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)


def ltx(**config: Any) -> nn.Module:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        **{"decoder_inject_noise": (False,) * 5} | config,
    )
    return randomize(vae, 4)


def ltx_by_frames() -> nn.Module:
    vae: Any = ltx()
    vae.use_framewise_encoding = vae.use_framewise_decoding = True
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4
    return vae


def ltx2() -> nn.Module:
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
    )
    return randomize(vae, 5)


def hunyuan_video() -> nn.Module:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return randomize(vae, 6)


def cog_video() -> nn.Module:
    """Hands features of earlier frames from call to call."""
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_height=64,
        sample_width=64,
        temporal_compression_ratio=4,
    )
    return randomize(vae, 9)


def mochi(**flags: bool) -> nn.Module:
    vae: Any = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1),
        temporal_expansions=(1, 2),
        spatial_expansions=(2, 2),
        add_attention_block=(False, True, True, True),
    )
    for name, value in flags.items():
        setattr(vae, name, value)
    return randomize(vae, 10)


def mochi_by_frames() -> nn.Module:
    return mochi(use_framewise_decoding=True)


def magvit() -> nn.Module:
    """Its convolutions keep the last frames of what went through them, until the VAE has them forget."""
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return randomize(vae, 9)


def allegro() -> nn.Module:
    """Tiles in time too, of one size all, into a picture of its own."""
    vae: Any = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.kernel, vae.stride = (8, 32, 32), (4, 16, 24)
    return randomize(vae, 13)


def hunyuan_video10() -> nn.Module:
    vae: Any = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4
    return randomize(vae, 14)


def hunyuan_refiner() -> nn.Module:
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return randomize(vae, 16)


def minimax() -> nn.Module:
    """Tiles of a size, with overlaps as they come; clips of frames apart."""
    vae: Any = AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_downsample_factors=(2, 2, 1),
        temporal_downsample_factors=(1, 2, 2),
        norm_num_groups=4,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=32,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_min_overlap_height = vae.tile_sample_min_overlap_width = 8
    return randomize(vae, 20)
