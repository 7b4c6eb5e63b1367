"""What quantized weights will take, before any is made: from shapes, and from blocks of files that are not read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.features.quantize.apply import nothing
from denoised.features.quantize.layers import layers
from denoised.features.quantize.methods import Method, method
from denoised.features.quantize.packed import Packed
from denoised.steps import parts

# What a weight is in its file, which is not read for that.
Stored = Callable[[Tensor], Tensor]
# Rows and columns of the matrices that sizes are learnt from.
_ROWS, _COLUMNS = 16, 256


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of one quantized weight. codes: in proportion to its values. scales: in proportion to its rows (outputs).
    columns: in pieces of so many it can be cut."""

    codes: float
    scales: float = 0.0
    columns: int = 1


def learnt(num_bytes: Callable[[int, int], int]) -> Callable[[torch.Size], Size]:
    """Sizes of all matrices from those of two. num_bytes: of so many rows and columns."""
    narrow, wide = num_bytes(_ROWS, _COLUMNS), num_bytes(_ROWS, 2 * _COLUMNS)
    value = (wide - narrow) / (_ROWS * _COLUMNS)
    row = narrow / _ROWS - value * _COLUMNS
    return lambda shape: Size(codes=value * shape.numel(), scales=row * shape[0])


def sizes(
    model: nn.Module, name: str, *, component: str, patterns: tuple[str, ...], device: torch.device, stored: Stored
) -> dict[str, Size]:
    """Of the layers that `apply` would quantize on this device, by path. Nothing is changed or read.

    Raises:
        InvalidConfigError: there is none that this method could quantize.
    """
    chosen = method(name, device)
    found = dict(layers(model, patterns, everywhere=chosen.everywhere, absent=True))
    sized = dict(_in_files(found, stored) if chosen.quantize is None else _made(found, chosen, device))
    if not sized:
        raise InvalidConfigError(nothing(name, component, model, len(found)))
    return sized


def _made(found: dict[str, nn.Module], chosen: Method, device: torch.device) -> Iterator[tuple[str, Size]]:
    size = _of_method(chosen.name, device)
    shapes = ((path, layer.get_parameter("weight").shape) for path, layer in found.items())
    return ((path, size(shape)) for path, shape in shapes if chosen.fits(shape))


@functools.cache
def _of_method(name: str, device: torch.device) -> Callable[[torch.Size], Size]:
    """As the method itself makes of matrices without memory; whatever their dtype, scales have their own."""
    make = method(name, device).quantize
    assert make is not None
    return learnt(lambda rows, columns: parts.num_bytes(make(torch.empty(rows, columns, device="meta"))))


def _in_files(found: dict[str, nn.Module], stored: Stored) -> Iterator[tuple[str, Size]]:
    for path, layer in found.items():
        weight = stored(layer.get_parameter("weight"))
        if isinstance(weight, Packed):
            yield path, Size(codes=parts.num_bytes(weight), columns=weight.columns)


def existing_sizes(model: nn.Module) -> dict[str, Size]:
    """Of weights that came quantized, by the path of their layer."""
    found = {path: layer._parameters.get("weight") for path, layer in model.named_modules()}
    made = {path: weight for path, weight in found.items() if weight is not None and parts.is_made(weight)}
    return {path: Size(codes=parts.num_bytes(weight)) for path, weight in made.items()}


def sizes_of_library(settings: Any, dtype: torch.dtype) -> Callable[[torch.Size], Size]:
    """Of weights that torchao has quantized by these settings of its own. Raises whatever torchao raises here."""
    from torchao.quantization import quantize_

    def num_bytes(rows: int, columns: int) -> int:
        layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
        quantize_(layer, settings)
        return parts.num_bytes(layer.weight)

    return learnt(num_bytes)
