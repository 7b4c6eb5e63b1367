"""VAE tiles dealt to ranks. Tiling itself, its overlaps and its blending, stays the VAE's own.

The VAE's `encode` or `decode` runs twice. First to list: its encoder and decoder note what they are called with and
answer with a stand-in, which costs nothing and is cut and blended to nothing. Then each rank computes its share of the
list, all tiles are exchanged, and the second run finds them as if it had just computed them. The frames of a tile, of
which each needs the features of those before, stay together.

Knows nothing of models. Needs ranks that make the same calls with the same arguments.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denoised import hf
from denoised.errors import InvalidConfigError, one_line
from denoised.features.vae_patch.exchange import compute
from denoised.features.vae_patch.listing import Desk, quiet, tiles_of
from denoised.features.vae_patch.sizes import resize
from denoised.features.vae_patch.standins import FORMS
from denoised.steps.collectives import Group
from denoised.steps.tally import count

FIELD = "vae_patch_parallel_size"
WAY_OUT = f"use {FIELD}=1"
# In which a config has the number of channels of latents.
CHANNELS = ("latent_channels", "z_dim", "z_channels", "decoder_input_channels")
# Frames, height and width of latents that show how a VAE calls its decoder; the larger for one of whole tiles only.
SMALL = ((2, 2, 2), (8, 8, 8), (8, 64, 64))


def apply(vae: nn.Module, group: Group, tile_size: int | None = None) -> None:
    """Enable tiling, and deal the tiles of `encode` and `decode` to `group`.

    A picture of one tile is computed whole on each rank, and counted as "vae_patch_single_tile".

    Args:
        tile_size: side of a tile in pixels; strides and overlaps keep their ratio to it. None: the VAE's own. Smaller
            tiles let more ranks take part in a small picture, and change its values where tiles meet.

    Raises:
        InvalidConfigError: this VAE does not tile, or its tiles cannot be dealt.
    """
    _check(vae, group)
    vae.enable_tiling()  # type: ignore[operator]
    if tile_size is not None:
        resize(vae, tile_size)
    desk = Desk()
    desk.forget = hf.wrap_forgetting(vae, desk.forgot)
    for name, child in vae.named_children():
        forward = desk.part(child) if name in ("encoder", "decoder") else quiet(child.forward)
        child.__dict__["forward"] = forward
    _try(vae, desk, group)
    for name in ("encode", "decode"):
        vae.__dict__[name] = _dealt(getattr(vae, name), desk, group)


def _dealt(method: Any, desk: Desk, group: Group) -> Any:
    """`encode` or `decode`, its tiles computed by all ranks."""

    @functools.wraps(method)
    def dealt(*args: Any, **kwargs: Any) -> Any:
        run = functools.partial(method, *args, **kwargs)
        calls = desk.listed(run)
        tiles = tiles_of(calls)
        if len(tiles) < 2:
            count("vae_patch_single_tile")
            return run()
        return desk.found(run, compute(calls, tiles, group, method.__name__))

    return dealt


def _check(vae: nn.Module, group: Group) -> None:
    name, size, config = type(vae).__name__, group.size(), getattr(vae, "config", {})
    if size < 2:
        raise InvalidConfigError(f"{FIELD}={size}: one rank has nobody to deal tiles of {name} to; use at least 2.")
    if not hf.asks_itself(vae, "use_tiling"):
        raise InvalidConfigError(f"{FIELD}={size}: {name} cannot tile, so there is nothing to deal; {WAY_OUT}.")
    if not isinstance(getattr(vae, "decoder", None), nn.Module):
        raise InvalidConfigError(f"{FIELD}={size}: {name} has no module named decoder to share; {WAY_OUT}.")
    kept = "it keeps features of a tile on its modules, and another tile would find them"
    if reason := hf.broken_tiling(vae) or (kept if hf.keeps_features(vae) else None):
        raise InvalidConfigError(f"{FIELD}={size}: tiles of {name} cannot be dealt ({reason}); {WAY_OUT}.")
    noise = config.get("decoder_inject_noise", False)
    if any(noise) if isinstance(noise, list | tuple) else noise:
        raise InvalidConfigError(
            f"{FIELD}={size}: the decoder of this {name} draws noise for each tile, so its result would depend on "
            f"the number of ranks; {WAY_OUT}."
        )


def _try(vae: nn.Module, desk: Desk, group: Group) -> None:
    """Find the form in which the VAE takes outputs, by listing a small decode: nothing is computed, and a VAE of
    another build shows itself now.

    Raises:
        InvalidConfigError: its decoder cannot be listed.
    """
    reasons = []
    for desk.form, shape in itertools.product(FORMS, _small_shapes(vae)):
        try:
            with torch.no_grad():
                if desk.listed(functools.partial(_small_decode, vae, shape)):
                    return
            reasons.append("its decoder is not called")
        except Exception as error:
            reasons.append(one_line(error, limit=120))
    raise InvalidConfigError(
        f"{FIELD}={group.size()}: tiles of {type(vae).__name__} cannot be dealt ({reasons[0]}); {WAY_OUT}."
    )


def _small_shapes(vae: Any) -> list[tuple[int, ...]]:
    """Shapes of latents with as many dims as the convolutions have, and of frames: some take them one by one."""
    num_dims = max(parameter.ndim for parameter in vae.parameters()) - 2
    num_channels = next(vae.config[name] for name in CHANNELS if vae.config.get(name))
    lengths = [sides[3 - num :] for num in dict.fromkeys((num_dims, 3)) for sides in SMALL]
    return [(1, num_channels, *sides) for sides in lengths]


def _small_decode(vae: Any, shape: Sequence[int]) -> None:
    weight = next(vae.decoder.parameters())
    # Not `weight.new_zeros`: the weight may still be in its file.
    decoded = vae.decode(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
    if not isinstance(getattr(decoded, "sample", decoded), Tensor):
        raise TypeError("decode gives no tensor")
