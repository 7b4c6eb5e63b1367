"""The layers of a pipeline that an adapter can act on, as they are before anything cuts them.

What an adapter fits is decided by the whole layers, so that all ranks decide alike; each rank then keeps its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from denoised import hf
from denoised.features.lora.beside import Beside, install


@dataclass(kw_only=True)
class Site:
    """One layer. shape: of its whole weight (out, in, *kernel). beside: what adds to it; None: it runs elsewhere."""

    layer: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    beside: Beside | None = None


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Sites by component and path. `main`: the component that files mean that name none."""

    pipeline: Any
    by_component: dict[str, dict[str, Site]]
    denoisers: tuple[str, ...]

    @property
    def main(self) -> str | None:
        return self.denoisers[0] if self.denoisers else None

    def prepare(self) -> None:
        """Weights have been cut and dealt, those of other ranks have no memory here: stand beside the others."""
        for sites in self.by_component.values():
            for site in sites.values():
                weight = site.layer._parameters.get("weight")
                if weight is None or not weight.is_meta:
                    site.beside = install(site.layer)


def survey(pipeline: Any, denoisers: tuple[str, ...]) -> Sites:
    """All layers of a pristine pipeline that an adapter can be put beside."""
    parts = {name: part for name, part in hf.components(pipeline).items() if isinstance(part, nn.Module)}
    return Sites(
        pipeline=pipeline,
        by_component={name: _sites(part) for name, part in parts.items()},
        denoisers=tuple(name for name in denoisers if name in parts),
    )


def _sites(model: nn.Module) -> dict[str, Site]:
    found = ((path, layer, whole_shape(layer)) for path, layer in model.named_modules())
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return {
        path: Site(layer=layer, shape=shape, dtype=_dtype(layer, usual))
        for path, layer, shape in found
        if shape is not None
    }


# A class of its own may pad or cut before it convolves, which what is beside it would have to do as well.
_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def whole_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """The weight's shape as the layer's own numbers say it, for a quantized one has another; None: no adapter fits."""
    numbers = vars(layer)
    if "in_features" in numbers and "out_features" in numbers:
        return numbers["out_features"], numbers["in_features"]
    if type(layer).forward in _CONVOLUTIONS and _is_plain(numbers):
        return numbers["out_channels"], numbers["in_channels"], *numbers["kernel_size"]
    return None


def _is_plain(convolution: dict[str, Any]) -> bool:
    """One group, zeros outside, no holes, nothing transposed: what trainers put adapters beside."""
    holes = {*convolution.get("dilation", ()), convolution.get("groups")} != {1}
    return not holes and convolution.get("padding_mode") == "zeros"


def _dtype(layer: nn.Module, usual: torch.dtype) -> torch.dtype:
    weight = layer._parameters.get("weight")
    return weight.dtype if weight is not None and weight.is_floating_point() else usual
