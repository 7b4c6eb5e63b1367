"""What autoencoders do not say of themselves: whether they ask their flags, and where they keep features of frames."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

SWITCHES = ("__init__", "enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing")
# With which a VAE forgets what its convolutions keep of earlier frames, on themselves: before another tile begins.
FORGET = "_clear_conv_cache"
# Where convolutions of a VAE without such a method keep it.
KEPT = "causal_cache"

# What is wrong with the tiling of a class, as of diffusers 0.42.1.
BROKEN = {"AutoencoderKLHunyuanImageRefiner": "its own tiled decode gives a picture of another size"}


def asks_itself(vae: Any, flag: str) -> bool:
    """Whether a method that computes looks at the flag: some classes have it and never ask."""
    if not hasattr(vae, flag):
        return False
    methods = [(name, method) for cls in type(vae).__mro__ for name, method in vars(cls).items()]
    codes = [inspect.unwrap(m).__code__ for name, m in methods if inspect.isfunction(m) and name not in SWITCHES]
    return any(flag in code.co_names for code in codes)


def wrap_forgetting(vae: Any, noticed: Callable[[], None]) -> Callable[[], None] | None:
    """Have `noticed` called whenever the VAE forgets its features; how to have it forget. None: it keeps none."""
    forget: Callable[[], None] | None = getattr(vae, FORGET, None)
    if forget is None:
        return None

    def forgetting() -> None:
        noticed()
        forget()

    vae.__dict__[FORGET] = forgetting
    return forget


def keeps_features(vae: Any) -> bool:
    """Whether modules keep features that nobody but the VAE's own loop can place or forget."""
    return not hasattr(vae, FORGET) and any(hasattr(module, KEPT) for module in vae.modules())


def broken_tiling(vae: Any) -> str | None:
    """What is wrong with what the VAE's own tiling gives."""
    return BROKEN.get(type(vae).__name__)
