"""Slicing and tiling of the VAE: switched on where its class looks at the switch, and counted where they had nothing
to act on, so that receipts can say so."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.steps.tally import count, counted

_FLAGS = (("vae_use_slicing", "use_slicing"), ("vae_use_tiling", "use_tiling"))
# What became of calls, in the counts of a request: parted, or whole.
_COUNTED = {"vae_use_slicing": ("vae_sliced", "vae_unsliced"), "vae_use_tiling": ("vae_tiled", "vae_untiled")}
_WHY = {
    "vae_use_slicing": "each call of the VAE was of one picture",
    "vae_use_tiling": "no picture was larger than a tile of this VAE",
}


def apply(pipeline: Any, config: EngineConfig) -> None:
    """What the settings ask for. Raises InvalidConfigError: the VAE cannot do that."""
    vae, asked = getattr(pipeline, "vae", None), [(s, flag) for s, flag in _FLAGS if getattr(config, s)]
    for setting, flag in asked:
        if not hf.asks_itself(vae, flag):
            raise InvalidConfigError(
                f"{setting}=True: the VAE of {type(pipeline).__name__} ({type(vae).__name__}) cannot do that; "
                "leave it out."
            )
        setattr(vae, flag, True)
    settings = tuple(setting for setting, _ in asked)
    if settings:
        _watch(vae, settings)


def inert(counts: Sequence[Mapping[str, int]]) -> list[str]:
    """Of what each rank counted for a request: the settings that did not act in it."""
    found = []
    for setting, (parted, whole) in _COUNTED.items():
        if any(each.get(whole) for each in counts) and not any(each.get(parted) for each in counts):
            found.append(f"{setting} did not act: {_WHY[setting]}.")
    return found


def _watch(vae: Any, settings: tuple[str, ...]) -> None:
    """Count what becomes of each call. Tiles are made by methods that say so in their names."""
    tiling = [name for name in dir(type(vae)) if "tiled_" in name and inspect.isfunction(getattr(type(vae), name))]
    for name in tiling if "vae_use_tiling" in settings else ():
        vae.__dict__[name] = _noting(getattr(vae, name), "vae_tiled")
    for name in ("encode", "decode"):
        vae.__dict__[name] = _watched(getattr(vae, name), settings, knows_tiles=bool(tiling))


def _noting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def noting(*args: Any, **kwargs: Any) -> Any:
        count(name)
        return method(*args, **kwargs)

    return noting


def _watched(method: Callable[..., Any], settings: tuple[str, ...], *, knows_tiles: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if "vae_use_slicing" in settings and given is not None:
            count("vae_sliced" if len(given) > 1 else "vae_unsliced")
        with counted() as counts:
            result = method(*args, **kwargs)
        if "vae_use_tiling" in settings and knows_tiles and not counts["vae_tiled"]:
            count("vae_untiled")
        return result

    return watched
