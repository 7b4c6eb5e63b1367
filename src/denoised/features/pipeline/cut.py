"""Which stage runs which block, and the memory that the others give back.

Knows blocks and costs; nothing of tensors in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from denoised.errors import InvalidConfigError
from denoised.spec.blocks import stacks
from denoised.spec.model_spec import ModelSpec


def blocks_of(model: nn.Module, spec: ModelSpec, num_stages: int) -> dict[str, nn.Module]:
    """The blocks that may be dealt to stages, by name, in order of execution.

    Raises:
        InvalidConfigError: there are none, or fewer than stages.
    """
    names = [name for stack in stacks(model, spec.stacks) for name in stack.names()]
    field, kind = f"pipeline_parallel_size={num_stages}", type(model).__name__
    if not names:
        raise InvalidConfigError(f"{field}: {kind} has no list of blocks to cut; use pipeline_parallel_size=1.")
    if num_stages > len(names):
        raise InvalidConfigError(f"{field} is more than the {len(names)} blocks of {kind}; use at most {len(names)}.")
    return {name: model.get_submodule(name) for name in names}


def num_weights(block: nn.Module) -> float:
    """The cost of a block that nobody has measured."""
    return float(sum(parameter.numel() for parameter in block.parameters()))


def deal(costs: Sequence[float], num_stages: int) -> list[int]:
    """The stage of each block: ranges in order, none empty, the dearest as cheap as possible."""

    @cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """The cost of the dearest range when blocks from `start` on go to so many stages, and where ranges end."""
        if stages == 1:
            return sum(costs[start:]), (len(costs),)
        ends = range(start + 1, len(costs) - stages + 2)
        tails = [(end, *best(end, stages - 1)) for end in ends]
        return min((max(sum(costs[start:end]), rest), (end, *more)) for end, rest, more in tails)

    _, ends = best(0, num_stages)
    return [sum(end <= index for end in ends) for index in range(len(costs))]


def drop_weights(block: nn.Module) -> None:
    """Parameters and buffers without memory, under their names. Weights that others share stay with those."""
    for part in block.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(_empty(parameter), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _empty(buffer))


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
