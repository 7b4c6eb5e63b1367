"""What ranks exchange around a divided layer. The layers' own forwards stay as they are, so that quantization and
adapters may replace them: the exchange follows as a hook on what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from denoised.spec import tensor as names
from denoised.spec.tensor import Attention, Shard
from denoised.steps.collectives import all_gather, all_reduce
from denoised.steps.tally import count

Group = dist.ProcessGroup


def exchange(layer: nn.Module, shard: Shard, group: Group, counted: str) -> None:
    """Whatever a layer of this role needs from the other ranks; `counted`: the name that its sums are counted under,
    beside that of the collective, which others use too."""
    if shard.role == "row":
        layer.register_forward_hook(lambda module, inputs, output: _sum(output, group, counted))
    elif shard.role == "gathered":
        layer.register_forward_hook(lambda module, inputs, output: all_gather(output, group, dim=-1))
    elif shard.role == "norm":
        layer.forward = _Norm(layer, shard, group)


def _sum(output: Tensor, group: Group, counted: str) -> Tensor:
    count(counted)
    return all_reduce(output, group)


class _Norm:
    """A root-mean-square norm over the heads of all ranks; the sum of squares travels, one number a token."""

    def __init__(self, norm: nn.Module, shard: Shard, group: Group) -> None:
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        self.norm, self.group = norm, group
        self.width = sum(shard.sizes) * shard.copies  # heads that several ranks hold are summed so often
        self.eps: float | None = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., this rank's heads side by side)."""
        wide = x.float()
        squares = all_reduce(wide.pow(2).sum(-1, keepdim=True), self.group)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        y = wide * torch.rsqrt(squares / self.width + eps) * self.norm.get_parameter("weight")
        bias = getattr(self.norm, "bias", None)
        return (y if bias is None else y + bias).to(x.dtype)


def slice_rotary(module: nn.Module, attention: Attention, group: Group) -> None:
    """Rotary tables over all heads are cut to this rank's; those that all heads share pass as they are."""
    rotary = _Rotary(attention, group, split=getattr(module, names.SPLIT_ROTARY[0], None) == names.SPLIT_ROTARY[1])
    module.register_forward_pre_hook(rotary, with_kwargs=True)


class _Rotary:
    def __init__(self, attention: Attention, group: Group, *, split: bool) -> None:
        self.width, self.heads, self.split = attention.width, attention.heads, split
        self.rank, self.degree = group.rank(), group.size()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tables = {name: self.cut(kwargs[name]) for name in names.ROTARY if kwargs.get(name) is not None}
        return args, kwargs | tables

    def cut(self, table: Any) -> Any:
        if isinstance(table, tuple | list):
            return type(table)(self.cut(part) for part in table)
        if self.split and table.ndim == 4 and table.shape[1] == self.heads:
            return table.chunk(self.degree, dim=1)[self.rank]
        if table.shape[-1] == self.width:
            return table.chunk(self.degree, dim=-1)[self.rank]
        return table
