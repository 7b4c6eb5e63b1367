"""Tiny autoencoders of diffusers' classes, each in small tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLKVAE,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderOobleck,
    AutoencoderTiny,
)
from torch import nn

from tests.tiny.weights import randomize
from tests.video_autoencoders import (
    allegro,
    cog_video,
    hunyuan_video,
    hunyuan_video10,
    ltx,
    ltx2,
    ltx_by_frames,
    magvit,
    minimax,
    mochi,
    mochi_by_frames,
    wan,
    wan_in_patches,
)

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


def kvae() -> nn.Module:
    vae = AutoencoderKLKVAE(
        channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 1), sample_size=32
    )
    return randomize(vae, 17)


def qwen_image21() -> nn.Module:
    """Frames one by one through convolutions in space."""
    vae: Any = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        scale_factor_spatial=4,
        in_channels=3,
        out_channels=3,
    )
    return randomize(vae, 21)


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
    "qwen_image21": Case(
        build=qwen_image21, latents=(8, 1, 20, 13), pixels=(3, 1, 80, 52), tile=32, tiles=(12, 12), usual=False
    ),
    "minimax": Case(
        build=minimax, latents=(4, 7, 20, 13), pixels=(3, 22, 80, 52), tile=None, tiles=(6, 12), batch=1, usual=False
    ),
}
