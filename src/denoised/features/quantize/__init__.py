"""Quantization: weights of few bits, made of the slice that a rank holds, at the moment when it is read.

A layer stays what it is, with another tensor as its weight: torch asks the tensor for the product. So nothing that
acts on layers later has to know of it. Where weights come from is not known here: `Later` puts off what is done to
them.
"""

from __future__ import annotations

from denoised.features.quantize import blocks
from denoised.features.quantize.apply import Done, Later, apply, check, existing
from denoised.features.quantize.methods import GGUF, check_dtype
from denoised.features.quantize.packed import Packed
from denoised.features.quantize.sizes import Size, existing_sizes, sizes, sizes_of_library

__all__ = [
    "GGUF",
    "Done",
    "Later",
    "Packed",
    "Size",
    "apply",
    "blocks",
    "check",
    "check_dtype",
    "existing",
    "existing_sizes",
    "sizes",
    "sizes_of_library",
]
