"""VAE tiles dealt to ranks: the values are those of the VAE's own tiling, and each rank computed its share of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderOobleck,
)
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.features import vae_patch
from denoised.features.vae_patch.sizes import resize
from denoised.steps.tally import counted
from tests.ranks import run_on_ranks
from tests.tiny import UPSTREAM_WARNINGS
from tests.tiny.weights import randomize

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]

STAGES = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """`latents` and `pixels`: shapes without the batch. `tile`: pixels. `tiles`: of one decode and one encode."""

    build: Callable[[], nn.Module]
    latents: tuple[int, ...]
    pixels: tuple[int, ...]
    tile: int
    tiles: tuple[int, int]
    batch: int = 2


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
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def tensor(output: Any) -> Tensor:
    """Of `decode` or `encode`."""
    if "sample" in output:
        return output.sample
    return output.latent if "latent" in output else output.latent_dist.parameters


@dataclass(frozen=True, kw_only=True)
class Measured:
    difference: float
    spread: float
    tiles: int
    whole: int
    gathers: int


def measure(method: str, plain: Any, dealt: Any, value: Tensor) -> Measured:
    with torch.no_grad():
        expected = tensor(getattr(plain, method)(value))
        with counted() as counts:
            got = tensor(getattr(dealt, method)(value))
    return Measured(
        difference=float((got - expected).abs().max()),
        spread=float(expected.std()),
        tiles=counts["vae_tiles"],
        whole=counts["vae_patch_single_tile"],
        gathers=counts["all_gather"],
    )


def pair(case: Case) -> tuple[Any, Any]:
    """The VAE's own tiling, and the same VAE with its tiles dealt."""
    plain: Any = case.build()
    plain.enable_tiling()
    resize(plain, case.tile)
    dealt: Any = case.build()
    vae_patch.apply(dealt, dist.group.WORLD, tile_size=case.tile)
    return plain, dealt


def both_ways(rank: int, world_size: int, name: str, slicing: bool) -> list[Measured]:
    case = CASES[name]
    vaes = pair(case)
    if slicing:
        for vae in vaes:
            vae.enable_slicing()
    batch = 2 if slicing else case.batch
    values = {"decode": random(batch, *case.latents), "encode": random(batch, *case.pixels)}
    return [measure(method, *vaes, value) for method, value in values.items()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("num_ranks", "slicing"), [(2, False), (3, True)])
def test_equal_and_shared(name: str, num_ranks: int, slicing: bool) -> None:
    ranks = run_on_ranks(both_ways, num_ranks, name, slicing)
    for way, total in enumerate(CASES[name].tiles):
        measured = [of_rank[way] for of_rank in ranks]
        tiles = [m.tiles for m in measured]
        assert {m.difference for m in measured} == {0.0}
        assert min(m.spread for m in measured) > 0.05, "the picture is flat"
        assert sum(tiles) == total * (2 if slicing else 1)
        assert max(tiles) - min(tiles) <= 1
        assert {(m.whole, m.gathers) for m in measured} == {(0, 2)}


def small_pictures(rank: int, world_size: int) -> list[Measured]:
    plain, dealt = pair(CASES["wan"])
    one = [measure("decode", plain, dealt, random(1, 8, 3, 4, 4))]
    for vae in (plain, dealt):
        vae.enable_slicing()
    return [*one, measure("decode", plain, dealt, random(3, 8, 3, 4, 4))]


def test_a_picture_of_one_tile_runs_whole_and_several_are_dealt() -> None:
    for single, several in run_on_ranks(small_pictures, 3):
        assert (single.difference, several.difference) == (0.0, 0.0)
        assert (single.whole, single.tiles, single.gathers) == (1, 0, 0)
        assert (several.whole, several.tiles, several.gathers) == (0, 1, 2)


def own_tile_size(rank: int, world_size: int) -> tuple[Measured, dict[str, Any]]:
    plain, dealt = CASES["kl"].build(), CASES["kl"].build()
    plain.enable_tiling()  # type: ignore[operator]
    vae_patch.apply(dealt, dist.group.WORLD)
    sizes = {name: value for name, value in vars(dealt).items() if name.startswith("tile_")}
    return measure("decode", plain, dealt, random(1, 4, 20, 13)), sizes


def test_the_vae_keeps_its_own_tile_size_by_default() -> None:
    for measured, sizes in run_on_ranks(own_tile_size, 2):
        assert sizes == {"tile_sample_min_size": 32, "tile_latent_min_size": 8, "tile_overlap_factor": 0.25}
        assert (measured.difference, measured.tiles) == (0.0, 6)


def cog_video() -> nn.Module:
    stages = ("CogVideoXDownBlock3D",) * 2, ("CogVideoXUpBlock3D",) * 2
    return AutoencoderKLCogVideoX(
        down_block_types=stages[0], up_block_types=stages[1], block_out_channels=(8, 8), norm_num_groups=4
    )


def magvit() -> nn.Module:
    """Its convolutions keep the last frames of what went through them."""
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
    return AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8
    )


def ltx2_audio() -> nn.Module:
    return AutoencoderKLLTX2Audio(base_channels=8, ch_mult=(1, 2), num_res_blocks=1, mel_bins=8)


def ltx_with_noise() -> nn.Module:
    return ltx(decoder_inject_noise=(True, False, False, False, False))


REFUSED = {
    "oobleck": (oobleck, "vae_patch_parallel_size=2: AutoencoderOobleck has no tiled_decode"),
    "ltx2_audio": (ltx2_audio, "vae_patch_parallel_size=2: AutoencoderKLLTX2Audio has no tiled_decode"),
    "ltx_with_noise": (ltx_with_noise, "the decoder of this AutoencoderKLLTXVideo draws noise"),
    "cog_video": (cog_video, "tiles of AutoencoderKLCogVideoX cannot be dealt"),
}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    messages = {name: message(build()) for name, (build, _) in REFUSED.items()}
    alone = dist.new_group([0])
    if rank == 0:
        messages["alone"] = message(kl(), alone)
    return messages | {"tile_size": message(kl(), tile_size=40), "tile_size_dc": message(dc(), tile_size=4)}


def message(vae: nn.Module, group: Any = None, tile_size: int | None = None) -> str:
    try:
        vae_patch.apply(vae, group or dist.group.WORLD, tile_size=tile_size)
    except InvalidConfigError as error:
        return str(error)
    return "accepted"


def test_what_cannot_be_dealt_is_refused_with_the_way_out() -> None:
    messages = run_on_ranks(refusals, 2)[0]
    for name, (_, words) in REFUSED.items():
        assert words in messages[name]
        assert messages[name].endswith("use vae_patch_parallel_size=1.")
    assert messages["alone"].startswith("vae_patch_parallel_size=1: one rank has nobody")
    assert messages["tile_size"] == "tile_size=40: tiles of AutoencoderKL are multiples of 16 pixels; use 32."
    assert messages["tile_size_dc"] == "tile_size=4: tiles of AutoencoderDC are multiples of 16 pixels; use 16."


def failures(rank: int, world_size: int) -> list[str]:
    """A decoder that fails on one rank, and one whose tiles depend on each other."""
    broken, chained = kl(), magvit()
    forward = broken.decoder.forward
    broken.decoder.forward = lambda x: forward(x) if rank != 1 else forward(x.flatten())
    latents = {broken: (1, 4, 20, 13), chained: (1, 4, 2, 10, 7)}
    return [failure(vae, random(*shape)) for vae, shape in latents.items()]


def failure(vae: Any, latents: Tensor) -> str:
    vae_patch.apply(vae, dist.group.WORLD, tile_size=64)
    with torch.no_grad():
        try:
            vae.decode(latents)
        except RuntimeError as error:
            return str(error)
    return "decoded"


def test_a_tile_that_fails_on_one_rank_fails_on_all() -> None:
    ours, theirs = run_on_ranks(failures, 2)
    assert ours[0] == "a VAE tile failed on rank 1 of 2"
    assert "shape" in theirs[0] or "Expected" in theirs[0]
    assert "keeps features of a tile on its modules" in ours[1]
