"""Small pictures for the pipelines that bring every input picture to about one megapixel, and small tiles for VAEs."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from diffusers import (
    AutoencoderDC,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderOobleck,
    HiDreamImagePipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
)

_LARGEST = 64 * 64  # pixels; enough for four tokens of the vision encoder

# Literals that a pipeline's constructor writes to itself: a side in latents, numbers of tokens.
_LITERALS: dict[type, dict[str, int]] = {
    HiDreamImagePipeline: {"default_sample_size": 16},
    HunyuanVideo15Pipeline: {
        "vision_num_semantic_tokens": 16,
        "tokenizer_max_length": 384,
        "tokenizer_2_max_length": 64,
    },
    HunyuanVideo15ImageToVideoPipeline: {"tokenizer_max_length": 384, "tokenizer_2_max_length": 64},
}

_MODULES = (
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_layered",
    "diffusers.pipelines.longcat_image.pipeline_longcat_image_edit",
)


@contextmanager
def small_images() -> Iterator[None]:
    """Within it, edit pipelines work at 64 x 64 pixels. Reference and engine must both be inside.

    The sizes are literals in the pipelines, but all of them go through one function of the pipeline's module, which
    takes an area and a ratio. A rank that a test spawns enters this by its path, before its first request.
    """
    with ExitStack() as stack:
        for name in _MODULES:
            module = importlib.import_module(name)
            stack.enter_context(patch.object(module, "calculate_dimensions", _limited(module.calculate_dimensions)))
        for pipeline, literals in _LITERALS.items():
            for name, value in literals.items():
                stack.enter_context(patch.object(pipeline, name, _Fixed(value), create=True))
        yield


# Tiles of 32 pixels for most VAEs of these classes; of 16 pixels, as 4 latents; of 16 latents of sound.
_SIDES = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
_SIDES |= {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}
_TILES: dict[type, dict[str, int]] = {
    AutoencoderDC: _SIDES | {"tile_latent_min_height": 16, "tile_latent_min_width": 16},
    AutoencoderKLHunyuanVideo15: {
        f"tile_{of}_min_{side}": length
        for side in ("height", "width")
        for of, length in (("sample", 16), ("latent", 4))
    },
    AutoencoderKLLTX2Video: _SIDES,
    AutoencoderKLLTXVideo: _SIDES,
    AutoencoderKLQwenImage: _SIDES,
    AutoencoderKLWan: _SIDES,
    AutoencoderOobleck: {
        "tile_sample_min_length": 128,
        "tile_sample_overlap": 16,
        "tile_latent_min_length": 16,
        "tile_latent_overlap": 2,
    },
}


@contextmanager
def small_tiles() -> Iterator[None]:
    """Within it, pictures of 64 pixels are of several tiles for all VAEs. Reference and engine must both be inside."""
    with ExitStack() as stack:
        for vae, lengths in _TILES.items():
            for name, value in lengths.items():
                stack.enter_context(patch.object(vae, name, _Fixed(value), create=True))
        yield


class _Fixed:
    """An attribute that keeps its value whatever an object assigns to it."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __get__(self, instance: object, owner: type | None = None) -> int:
        return self._value

    def __set__(self, instance: object, value: int) -> None:
        pass


def _limited(calculate: Callable[[float, float], Any]) -> Callable[[float, float], Any]:
    def calculate_small(target_area: float, ratio: float) -> Any:
        return calculate(min(target_area, _LARGEST), ratio)

    return calculate_small
