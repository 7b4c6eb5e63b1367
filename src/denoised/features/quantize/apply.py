"""Putting quantized weights into a model's layers, and saying how many and how large they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.features.quantize.layers import layers
from denoised.features.quantize.methods import Method, check_runs, method
from denoised.steps import parts

# `later(weight, quantize)` gives what stands for `quantize(weight)`, read or not, and the bytes that it will have;
# None: it stays what it is. `quantize` None: as it is in its file, if it is quantized there.
Later = Callable[[Tensor, Callable[[Tensor], Tensor] | None], tuple[Tensor, int] | None]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What quantization did to one component on this rank. Bytes are of the layers that are quantized."""

    component: str
    method: str
    layers: int
    bytes_before: int
    bytes_after: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Whether the method runs on this device. Raises InvalidConfigError."""
    check_runs(name, device, dtype)


def apply(model: nn.Module, name: str, *, component: str, patterns: tuple[str, ...], later: Later) -> Done:
    """Quantize the layers of a model, in place. Nothing that is not read yet is read.

    Raises:
        InvalidConfigError: there is none that this method could quantize.
    """
    chosen = method(name, next(model.parameters()).device)
    found = [layer for _, layer in layers(model, patterns, everywhere=chosen.everywhere)]
    sizes = [size for layer in found if (size := _quantize(layer, chosen, later)) is not None]
    if not sizes:
        raise InvalidConfigError(nothing(name, component, model, len(found)))
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    return Done(component=component, method=name, layers=len(sizes), bytes_before=before, bytes_after=after)


def _quantize(layer: nn.Module, chosen: Method, later: Later) -> tuple[int, int] | None:
    """Bytes of its weight before and after; None: it stays what it is."""
    weight = layer.get_parameter("weight")
    found = later(weight, chosen.quantize) if chosen.fits(weight.shape) else None
    if found is None:
        return None
    layer.weight = nn.Parameter(found[0], requires_grad=False)
    return weight.numel() * weight.element_size(), found[1]


def nothing(name: str, component: str, model: nn.Module, num: int) -> str:
    """Why a method cannot act on a component that has so many linear layers."""
    what = f"has {num} layers, none of which it can take" if num else "has no linear layers in blocks"
    return f"quantization={name!r}: {component} ({type(model).__name__}) {what}; leave {component} out."


def existing(model: nn.Module, *, component: str) -> Done | None:
    """The same of a model that came quantized, from its own files."""
    found = (layer._parameters.get("weight") for layer in model.modules())
    weights = [weight for weight in found if weight is not None and parts.is_made(weight)]
    if not weights:
        return None
    return Done(
        component=component,
        method=type(weights[0]).__name__,
        layers=len(weights),
        bytes_before=sum(weight.numel() * weight.element_size() for weight in weights),
        bytes_after=sum(parts.num_bytes(weight) for weight in weights),
    )
