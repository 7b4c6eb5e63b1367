"""The kinds of blocks that GGUF files have: how many values and bytes, and what these mean. diffusers knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def block(kind: int) -> tuple[int, int]:
    """Values and bytes of one block."""
    values, num_bytes = _library().GGML_QUANT_SIZES[_kinds()(kind)]
    return int(values), int(num_bytes)


def unpack(kind: int) -> Callable[..., Any]:
    """What computes the values of blocks (number, bytes): `(blocks, values, bytes, dtype)`."""
    function: Callable[..., Any] = _library().dequantize_functions[_kinds()(kind)]
    return function


def plain_dtype(kind: int) -> torch.dtype | None:
    """Of plain numbers that a file has as bytes; None: blocks."""
    return torch.bfloat16 if kind == _kinds().BF16 else None


def is_known(kind: int) -> bool:
    return kind in (_kinds().F32, _kinds().F16) or kind in _library().dequantize_functions


def _kinds() -> Any:
    import gguf

    return gguf.GGMLQuantizationType


def _library() -> Any:
    """Imported when it is needed: it is there with the package gguf alone."""
    import diffusers.quantizers.gguf.utils

    return diffusers.quantizers.gguf.utils
