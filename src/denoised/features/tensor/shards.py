"""Cutting: a layer keeps this rank's slice of its weight and no more, and says so in its numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from denoised.features.tensor.plan import weight
from denoised.spec import tensor as names
from denoised.spec.tensor import Attention, Layer, Shard


def shard_of(layer: Layer, attention: Attention | None, degree: int, rank: int) -> Shard:
    """What this rank holds of a layer; `attention` is the one that the layer is in."""
    copies = key_copies(attention, degree) if attention is not None and layer.copied else 1
    return Shard(role=layer.role, dim=layer.dim, sizes=layer.sizes, degree=degree, rank=rank, copies=copies)


def key_copies(attention: Attention, degree: int) -> int:
    """How many neighbouring ranks hold the same key heads: more than one where there are fewer heads than ranks."""
    return max(1, degree // attention.key_heads)


def cut(layer: nn.Module, shard: Shard) -> None:
    """Keep the slice; memory of the whole weight is free once nothing else refers to it."""
    matrix = weight(layer)
    assert matrix is not None
    layer.weight = _parameter(shard.take(matrix.detach()), like=matrix)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        layer.bias = _parameter(_bias(bias.detach(), shard), like=bias)
    _count_anew(layer, shard)
    layer.denoised_shard = shard  # type: ignore[assignment]


def _bias(bias: Tensor, shard: Shard) -> Tensor:
    """Cut with the outputs. Where outputs are summed over ranks the bias counts once: rank 0 has it, others zeros."""
    if shard.dim == 0:
        return shard.take(bias)  # type: ignore[no-any-return]
    return bias if shard.rank == 0 else torch.zeros_like(bias)


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _count_anew(layer: nn.Module, shard: Shard) -> None:
    if shard.role == "gathered":
        return  # what comes out is whole
    if shard.role == "table":
        layer.embedding_dim = shard.length  # type: ignore[assignment]
        return
    for name in names.SIZES[shard.dim]:
        if hasattr(layer, name):
            setattr(layer, name, shard.length)
    if shard.dim == 0 and getattr(layer, "groups", 1) == sum(shard.sizes):
        layer.groups = shard.length  # type: ignore[assignment]


def divide_numbers(module: nn.Module, attention: Attention, degree: int) -> None:
    """The numbers that an attention's processor computes with, for this rank's heads."""
    heads, key_heads = attention.heads // degree, max(1, attention.key_heads // degree)
    head = attention.width // attention.heads
    local = {
        **dict.fromkeys(names.HEADS, heads),
        **dict.fromkeys(names.KEY_HEADS, key_heads),
        **dict.fromkeys(names.GROUPS, heads // key_heads),
        **dict.fromkeys(names.WIDTHS, heads * head),
        **dict.fromkeys(names.KEY_WIDTHS, key_heads * head),
    }
    for name, value in local.items():
        if isinstance(vars(module).get(name), int):
            setattr(module, name, value)


def divide_scales(module: nn.Module, attention: Attention, degree: int, rank: int) -> None:
    """Parameters with a number for each head keep those of this rank's."""
    for name in attention.scales:
        whole = module.get_parameter(name)
        setattr(module, name, _parameter(whole.detach().chunk(degree)[rank].clone(), like=whole))


def divide_hidden(module: nn.Module, degree: int) -> None:
    """The same for the hidden width of a feed-forward whose layers a module holds."""
    for name in names.HIDDEN_WIDTHS:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, vars(module)[name] // degree)
