"""Tensors of rows that shared a forward, where texts are padded to the longest, beside those of rows that did not."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from denoised.errors import EngineError


def fitted(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut or filled with zeros at the end: texts are padded there to the longest of those that share a forward.

    Raises:
        EngineError: the shapes differ otherwise.
    """
    if len(shape) != tensor.dim() or sum(a != b for a, b in zip(shape, tensor.shape, strict=True)) > 1:
        raise EngineError(f"cache_backend: {tuple(tensor.shape)} was kept of a step where {tuple(shape)} is needed")
    for dim, size in enumerate(shape):
        missing = size - tensor.shape[dim]
        if missing < 0:
            tensor = tensor.narrow(dim, 0, size)
        elif missing > 0:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))
    return tensor
