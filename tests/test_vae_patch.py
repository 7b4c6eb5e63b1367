"""VAE tiles dealt to ranks: the values are those of the VAE's own tiling, and each rank computed its share of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLCosmos, AutoencoderKLLTX2Audio, AutoencoderVidTok
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.features import vae_patch
from denoised.features.vae_patch.sizes import resize
from denoised.steps.tally import counted
from tests.autoencoders import CASES, Case, dc, kl, oobleck
from tests.ranks import run_on_ranks
from tests.tiny import UPSTREAM_WARNINGS
from tests.video_autoencoders import hunyuan_refiner, ltx

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UPSTREAM_WARNINGS]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def tensor(output: Any) -> Tensor:
    """Of `decode` or `encode`."""
    value = next(output[name] for name in ("sample", "latent", "latents", "latent_dist") if name in output)
    return value if isinstance(value, Tensor) else next(v for v in vars(value).values() if isinstance(v, Tensor))


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
    if case.tile is not None:
        resize(plain, case.tile)
    dealt: Any = case.build()
    vae_patch.apply(dealt, dist.group.WORLD, tile_size=case.tile)
    return plain, dealt


def _marked(name: str) -> Any:
    return pytest.param(name, marks=() if CASES[name].usual else pytest.mark.slow)


def both_ways(rank: int, world_size: int, name: str, slicing: bool) -> list[Measured]:
    case = CASES[name]
    vaes = pair(case)
    if slicing:
        for vae in vaes:
            vae.enable_slicing()
    batch = 2 if slicing else case.batch
    shapes = {"decode": case.latents, "encode": case.pixels}
    return [measure(method, *vaes, random(batch, *shape)) for method, shape in shapes.items() if shape]


@pytest.mark.parametrize("name", [_marked(name) for name in CASES])
@pytest.mark.parametrize(("num_ranks", "slicing"), [(2, False), (3, True)])
def test_equal_and_shared(name: str, num_ranks: int, slicing: bool) -> None:
    ranks = run_on_ranks(both_ways, num_ranks, name, slicing)
    for way, total in enumerate(filter(None, CASES[name].tiles)):
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
    several = measure("decode", plain, dealt, random(3, 8, 3, 4, 4))
    return [*one, several, measure("decode", *pair(CASES["kl"]), random(1, 4, 6, 12))]


def test_a_picture_of_one_tile_runs_whole_and_several_are_dealt() -> None:
    """Also when there are fewer than ranks: then the last of them waits for the others."""
    for rank, (single, several, two) in enumerate(run_on_ranks(small_pictures, 3)):
        assert (single.difference, several.difference, two.difference) == (0.0, 0.0, 0.0)
        assert (single.whole, single.tiles, single.gathers) == (1, 0, 0)
        assert (several.whole, several.tiles, several.gathers) == (0, 1, 2)
        assert (two.whole, two.tiles, two.gathers) == (0, int(rank < 2), 2)


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


def vid_tok() -> nn.Module:
    """Its convolutions keep the last frames of what went through them, and nothing says when a tile ends."""
    return AutoencoderVidTok(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)


def ltx2_audio() -> nn.Module:
    return AutoencoderKLLTX2Audio(base_channels=8, ch_mult=(1, 2), num_res_blocks=1, mel_bins=8)


def cosmos() -> nn.Module:
    """Has the switch, and no method that asks for it."""
    return AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8), decode_block_out_channels=(8, 8), attention_resolutions=(8,), num_layers=1
    )


def ltx_with_noise() -> nn.Module:
    return ltx(decoder_inject_noise=(True, False, False, False, False))


REFUSED = {
    "ltx2_audio": (ltx2_audio, "vae_patch_parallel_size=2: AutoencoderKLLTX2Audio cannot tile"),
    "cosmos": (cosmos, "vae_patch_parallel_size=2: AutoencoderKLCosmos cannot tile"),
    "ltx_with_noise": (ltx_with_noise, "the decoder of this AutoencoderKLLTXVideo draws noise"),
    "vid_tok": (vid_tok, "tiles of AutoencoderVidTok cannot be dealt (it keeps features of a tile on its modules"),
    "refiner": (hunyuan_refiner, "(its own tiled decode gives a picture of another size)"),
}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    messages = {name: message(build()) for name, (build, _) in REFUSED.items()}
    alone = dist.new_group([0])
    if rank == 0:
        messages["alone"] = message(kl(), alone)
    sizes = {"": (kl, 40), "_dc": (dc, 4), "_oobleck": (oobleck, 64)}
    return messages | {f"tile_size{of}": message(build(), tile_size=size) for of, (build, size) in sizes.items()}


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
    assert messages["tile_size_oobleck"] == "tile_size=64: tiles of AutoencoderOobleck have no sides; leave it out."
    assert messages["tile_size_dc"] == "tile_size=4: tiles of AutoencoderDC are multiples of 16 pixels; use 16."


def test_the_tiling_that_is_refused_as_broken_still_is() -> None:
    vae: Any = hunyuan_refiner()
    vae.enable_tiling()
    resize(vae, 32)
    with torch.no_grad():
        assert vae.decode(random(1, 4, 1, 10, 10)).sample.shape[-2:] != (40, 40)


def failures(rank: int, world_size: int) -> list[str]:
    """A decoder that fails on one rank, and one whose tiles depend on each other."""
    broken, chained = kl(), kl()
    forward = broken.decoder.forward
    broken.decoder.forward = lambda x: forward(x) if rank != 1 else forward(x.flatten())
    chained.decoder.conv_in.register_forward_hook(lambda module, args, output: setattr(module, "kept", output))
    return [failure(vae, random(1, 4, 20, 13)) for vae in (broken, chained)]


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
