"""Finding out where the outputs of blocks go: what the code between blocks makes of them, and for whom.

Dispatched operations are observed, so views, changes in place and models' own containers of tensors are all seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from denoised.features.pipeline.layout import tensors

# The i-th tensor in the output of the e-th call of a block: (e, i).
Source = tuple[int, int]
Sources = frozenset[Source]
_NONE: Sources = frozenset()
_DECIDES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows of every memory which outputs of blocks it was computed from, too many rather than too few.

    Weak references to memories, not addresses: an address may be used again, a reference is never.

    decisive: outputs whose values decide what the program does next, or shapes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: dict[StorageWeakRef, Sources] = {}
        self.decisive: Sources = _NONE

    def mark(self, tensor: Tensor, source: Source) -> None:
        """From here on `tensor` is this output of a block, whatever it was computed from."""
        self._sources[_memory(tensor)] = frozenset({source})

    def sources(self, used: Iterable[Tensor]) -> Sources:
        return _NONE.union(*(self._sources.get(_memory(tensor), _NONE) for tensor in used))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        sources = self.sources(tensors((args, kwargs)))
        result = func(*args, **kwargs)
        if sources:
            self._note(func, sources, tensors((result, _written(func, args, kwargs))))
        return result

    def _note(self, func: Any, sources: Sources, results: list[Tensor]) -> None:
        if _DECIDES & set(func.tags):
            self.decisive |= sources
        for tensor in results:
            memory = _memory(tensor)
            self._sources[memory] = self._sources.get(memory, _NONE) | sources


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that the operation changes in place."""
    positional = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    given = positional | kwargs
    return [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
