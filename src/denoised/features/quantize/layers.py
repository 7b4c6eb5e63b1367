"""Which layers of a model are quantized: matrices of blocks that are nobody else's weights too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from denoised.spec.quantization import is_left


def layers(
    model: nn.Module, patterns: tuple[str, ...] = (), *, everywhere: bool = False, absent: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer, in the order of the model. Those of other ranks, without memory here, are left out.

    everywhere: also those outside of blocks, and those that are usually left alone.
    absent: also those without memory, of a model that has no weights at all.

    Only torch's own linear layer: one of another class may do with its weight what quantized ones cannot.
    """
    inside = _in_blocks(model)
    uses = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)
    for path, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        plain = type(layer) is nn.Linear and weight is not None and (absent or not weight.is_meta)
        chosen = everywhere or (id(layer) in inside and not is_left(path, patterns))
        if plain and chosen and uses[id(weight)] == 1:
            yield path, layer


def _in_blocks(model: nn.Module) -> set[int]:
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    return {id(layer) for blocks in lists for layer in blocks.modules()}
