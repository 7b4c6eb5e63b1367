"""A plugin for ranks: rank 1 fails, alone, for pictures of certain heights. Real errors in real places.

16: its denoiser raises.      32: its VAE raises.      80: the pipeline's own code raises.      96: the rank dies.
112: the rank hangs.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel


def _on_rank_one(cls: type, method: str, fails: Callable[..., bool], fail: Callable[[], None]) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() == 1 and fails(*args, **kwargs):
            fail()
        return original(self, *args, **kwargs)

    setattr(cls, method, wrapped)


def _raise() -> None:
    raise RuntimeError("planted fault")


def _die() -> None:
    os._exit(9)


def _hang() -> None:
    time.sleep(3600)


_on_rank_one(QwenImageTransformer2DModel, "forward", lambda *a, **k: k["img_shapes"][0][0][1] == 2, _raise)
_on_rank_one(AutoencoderKLQwenImage, "decode", lambda z, *a, **k: z.shape[-2] == 8, _raise)
_on_rank_one(QwenImagePipeline, "prepare_latents", lambda *a, **k: a[2] == 80, _raise)
_on_rank_one(QwenImagePipeline, "prepare_latents", lambda *a, **k: a[2] == 96, _die)
_on_rank_one(QwenImagePipeline, "prepare_latents", lambda *a, **k: a[2] == 112, _hang)
