"""Which stage runs which block, and the memory that the others give back.

Each stage has several ranges of blocks, in turn with the others: the more rounds, the sooner every stage has a row.
Knows blocks and costs; nothing of tensors in flight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from denoised.errors import InvalidConfigError
from denoised.features.pipeline.order import HANDOVER, order, parts
from denoised.spec.blocks import stacks
from denoised.spec.model_spec import ModelSpec

# Ranges of blocks a stage. As many rows as stages wait 1 / (1 + rounds x rows / (stages - 1)) of the time: of two
# stages 1/3 with one round, 1/17 with eight. Sixteen would gain another 3%, for twice the messages.
MAX_ROUNDS = 8


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
    """The cost of a block whose operations are not known."""
    return float(sum(parameter.numel() for parameter in block.parameters()))


@functools.lru_cache(maxsize=256)
def deal(costs: tuple[float, ...], num_stages: int, max_rounds: int = MAX_ROUNDS) -> tuple[int, ...]:
    """The stage of each block: that number of rounds with which as many rows as stages take the least time.

    What a stage holds counts in that: the fullest one is busy with all rows.
    """
    handover = HANDOVER * sum(costs) / len(costs)
    ranges = cuts(costs, num_stages * min(max_rounds, len(costs) // num_stages))

    def seconds(stages: tuple[int, ...]) -> float:
        return order((parts(stages, costs),) * num_stages, handover).seconds

    dealt = [_in_turn(ends, num_stages) for ends in ranges[num_stages - 1 :: num_stages]]
    return min(dealt, key=seconds)


def cuts(costs: Sequence[float], most: int) -> list[tuple[int, ...]]:
    """For one range, two, ... `most`: where they end, none empty, the dearest as cheap as can be, all about equal."""
    sums = [0.0, *itertools.accumulate(costs)]
    # The best way to cut what lies before each block into so many ranges: dearest, sum of squares, ends.
    best: list[_Way] = [(sums[end], sums[end] ** 2, (end,)) for end in range(len(sums))]
    found = [best[-1][2]]
    for num in range(2, most + 1):
        best = [min(_longer(best, sums, num, end), default=_NO_WAY) for end in range(len(sums))]
        found.append(best[-1][2])
    return found


_Way = tuple[float, float, tuple[int, ...]]
_NO_WAY: _Way = (float("inf"), float("inf"), ())


def _longer(best: list[_Way], sums: list[float], num: int, end: int) -> Iterator[_Way]:
    for start in range(num - 1, end):
        dearest, squares, ends = best[start]
        cost = sums[end] - sums[start]
        yield max(dearest, cost), squares + cost**2, (*ends, end)


def _in_turn(ends: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """The stage of each block, ranges going to stages in turn."""
    return tuple(sum(end <= block for end in ends) % num_stages for block in range(ends[-1]))


def drop_weights(block: nn.Module) -> None:
    """Parameters and buffers without memory, under their names. Weights that others share stay with those."""
    for part in block.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(_empty(parameter), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _empty(buffer))


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
