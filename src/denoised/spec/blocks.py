"""Where a denoiser's blocks are: the lists that hold almost all of its weights, in the order of execution.

Read off a pristine module, so that pipeline, weight sharding, caches and offload need no list per model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A list of less than this share of the weights is no stack of blocks (embeddings, small heads).
SMALLEST_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One list of blocks: its path in the model, and the blocks in order."""

    path: str
    blocks: tuple[Any, ...]

    def names(self) -> list[str]:
        return [f"{self.path}.{index}" for index in range(len(self.blocks))]


def stacks(model: Any, declared: tuple[str, ...] = ()) -> tuple[Stack, ...]:
    """The stacks of a model; `declared` gives their paths where the order of definition is not that of execution."""
    from torch import nn

    paths = declared or tuple(name for name, part in model.named_children() if isinstance(part, nn.ModuleList))
    found = [Stack(path=path, blocks=tuple(model.get_submodule(path))) for path in paths if _has(model, path)]
    total = sum(parameter.numel() for parameter in model.parameters())
    return tuple(stack for stack in found if declared or _weights(stack) >= SMALLEST_SHARE * total)


def _has(model: Any, path: str) -> bool:
    return path in {name for name, _ in model.named_modules()}


def _weights(stack: Stack) -> int:
    return sum(parameter.numel() for block in stack.blocks for parameter in block.parameters())
