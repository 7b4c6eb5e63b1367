"""Small pictures for the pipelines that bring every input picture to about one megapixel."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

_LARGEST = 64 * 64  # pixels; enough for four tokens of the vision encoder

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
        yield


def _limited(calculate: Callable[[float, float], Any]) -> Callable[[float, float], Any]:
    def calculate_small(target_area: float, ratio: float) -> Any:
        return calculate(min(target_area, _LARGEST), ratio)

    return calculate_small
