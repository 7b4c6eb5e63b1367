"""Smaller or larger tiles for a VAE, by the attributes in which diffusers keeps their lengths."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from torch import nn

from denoised.errors import InvalidConfigError

IN_PIXELS, IN_LATENTS = "tile_sample_", "tile_latent_"
IN_SPACE = ("_size", "_height", "_width")


def resize(vae: nn.Module, size: int) -> None:
    """Tiles of `size` by `size` pixels; strides in proportion.

    Raises:
        InvalidConfigError: lengths in pixels would be no whole latents, or overlaps no whole pixels.
    """
    lengths = _lengths(vae)
    if not lengths:
        raise InvalidConfigError(f"tile_size={size}: tiles of {type(vae).__name__} have no sides; leave it out.")
    base = max(lengths.values())
    step = _step(vae, lengths, base)
    if size < step or size % step:
        raise InvalidConfigError(
            f"tile_size={size}: tiles of {type(vae).__name__} are multiples of {step} pixels; "
            f"use {max(size // step, 1) * step}."
        )
    for name, length in lengths.items():
        setattr(vae, name, length * size // base)


def _lengths(vae: nn.Module) -> dict[str, int]:
    names = [name for name in vars(vae) if name.startswith((IN_PIXELS, IN_LATENTS)) and name.endswith(IN_SPACE)]
    return {name: getattr(vae, name) for name in names}


def _step(vae: nn.Module, lengths: dict[str, int], base: int) -> int:
    """The sizes for which every length in pixels is a number of latents, and every overlap a number of pixels."""
    config: Any = vae.config
    latent = int(getattr(vae, "spatial_compression_ratio", 0)) or 2 ** (len(config.block_out_channels) - 1)
    factors = [value for name, value in vars(vae).items() if name.startswith("tile_overlap_factor")]
    steps = [latent, *(latent * Fraction(factor).limit_denominator(64).denominator for factor in factors)]
    for name, length in lengths.items():
        whole = base * (latent if name.startswith(IN_PIXELS) else 1)
        steps.append(whole // math.gcd(whole, length))
    return math.lcm(*steps)
