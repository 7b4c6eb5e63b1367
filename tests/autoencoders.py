"""Tiny autoencoders of diffusers' classes, each in small tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLKVAE,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderOobleck,
    AutoencoderTiny,
)
from torch import nn

from tests.tiny.weights import randomize

STAGES = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """`latents` and `pixels`: shapes without the batch. `pixels=()`: its own tiled encode fails. `tile`: pixels; None:
    the VAE's own. `tiles`: of one decode and one encode. `usual=False`: for the full run."""

    build: Callable[[], nn.Module]
    latents: tuple[int, ...]
    pixels: tuple[int, ...]
    tile: int | None
    tiles: tuple[int, int]
    batch: int = 2
    usual: bool = True


def kl(**config: Any) -> nn.Module:
    return _image_vae(AutoencoderKL, use_quant_conv=True, use_post_quant_conv=True, **config)


def flux2() -> nn.Module:
    return _image_vae(AutoencoderKLFlux2)


def _image_vae(cls: Any, **config: Any) -> nn.Module:
    vae = cls(
        down_block_types=("DownEncoderBlock2D",) * STAGES,
        up_block_types=("UpDecoderBlock2D",) * STAGES,
        block_out_channels=(8,) * STAGES,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        **config,
    )
    return randomize(vae, 1)


def qwen_image() -> nn.Module:
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return randomize(vae, 2)


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


def dc() -> nn.Module:
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    return randomize(vae, 7)


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


def oobleck() -> nn.Module:
    """Sound, in tiles of 16 latents."""
    vae: Any = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    )
    vae.tile_sample_min_length, vae.tile_sample_overlap = 128, 16
    vae.tile_latent_min_length, vae.tile_latent_overlap = 16, 2
    return randomize(vae, 11)


def tiny() -> nn.Module:
    """Writes tiles into a picture of its own."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    return randomize(vae, 12)


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


def hunyuan_image() -> nn.Module:
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
    )
    return randomize(vae, 15)


def hunyuan_refiner() -> nn.Module:
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return randomize(vae, 16)


def kvae() -> nn.Module:
    vae = AutoencoderKLKVAE(
        channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 1), sample_size=32
    )
    return randomize(vae, 17)


CASES = {
    "kl": Case(build=kl, latents=(4, 20, 13), pixels=(3, 80, 52), tile=32, tiles=(12, 12)),
    "flux2": Case(build=flux2, latents=(4, 20, 13), pixels=(3, 80, 52), tile=32, tiles=(12, 12)),
    "qwen_image": Case(build=qwen_image, latents=(8, 1, 20, 13), pixels=(3, 1, 80, 52), tile=32, tiles=(12, 12)),
    "wan": Case(build=wan, latents=(8, 3, 10, 7), pixels=(3, 9, 80, 56), tile=32, tiles=(12, 12)),
    "wan_in_patches": Case(
        build=wan_in_patches, latents=(8, 2, 10, 7), pixels=(3, 5, 160, 112), tile=64, tiles=(12, 4)
    ),
    "ltx": Case(build=ltx, latents=(8, 2, 20, 13), pixels=(3, 5, 80, 52), tile=32, tiles=(6, 6)),
    "ltx_by_frames": Case(
        build=ltx_by_frames, latents=(8, 4, 20, 13), pixels=(3, 13, 80, 52), tile=32, tiles=(24, 24)
    ),
    "ltx2": Case(build=ltx2, latents=(8, 2, 20, 13), pixels=(3, 5, 80, 52), tile=32, tiles=(6, 6)),
    "hunyuan_video": Case(  # its own attention takes one video at a time
        build=hunyuan_video, latents=(4, 2, 20, 13), pixels=(3, 5, 80, 52), tile=32, tiles=(12, 12), batch=1
    ),
    "dc": Case(build=dc, latents=(4, 40, 26), pixels=(3, 80, 52), tile=16, tiles=(24, 24)),
    "cog_video": Case(build=cog_video, latents=(4, 5, 16, 10), pixels=(3, 17, 64, 40), tile=None, tiles=(6, 6)),
    "mochi": Case(build=mochi, latents=(4, 3, 12, 9), pixels=(3, 6, 48, 36), tile=32, tiles=(4, 4), usual=False),
    "mochi_by_frames": Case(
        build=mochi_by_frames, latents=(4, 3, 12, 9), pixels=(3, 6, 48, 36), tile=32, tiles=(4, 4)
    ),
    "magvit": Case(build=magvit, latents=(4, 3, 10, 7), pixels=(3, 9, 80, 56), tile=64, tiles=(2, 2)),
    "oobleck": Case(build=oobleck, latents=(4, 40), pixels=(2, 320), tile=None, tiles=(4, 4)),
    "tiny": Case(build=tiny, latents=(4, 24, 16), pixels=(3, 192, 128), tile=128, tiles=(4, 4)),
    "allegro": Case(
        build=allegro, latents=(4, 3, 6, 7), pixels=(3, 12, 48, 56), tile=None, tiles=(8, 8), batch=1, usual=False
    ),
    "hunyuan_video10": Case(
        build=hunyuan_video10, latents=(4, 4, 12, 9), pixels=(3, 13, 48, 36), tile=32, tiles=(16, 16), usual=False
    ),
    "hunyuan_image": Case(build=hunyuan_image, latents=(4, 20, 13), pixels=(), tile=32, tiles=(12, 0), usual=False),
    "kvae": Case(build=kvae, latents=(4, 20, 13), pixels=(3, 80, 52), tile=None, tiles=(12, 12), usual=False),
}
