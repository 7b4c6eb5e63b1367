"""Tensor parallelism: every rank holds a slice of each block's matrices and computes with its heads alone.

Slices are plain local tensors on ordinary layers, so that whatever is applied later needs to know nothing of this.
A divided layer says how it was cut: `layer.denoised_shard`, a `denoised.spec.tensor.Shard`.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from denoised.errors import InvalidConfigError
from denoised.features.tensor import forwards, shards
from denoised.features.tensor.degrees import allowed, listed, obstacle
from denoised.features.tensor.plan import SMALLEST_SHARE, UnknownLayerError, read, share
from denoised.spec.model_spec import ModelSpec
from denoised.spec.tensor import Layer, Plan, Vocabulary, vocabulary

__all__ = ["allowed_degrees", "apply", "apply_encoder", "cuts"]

# What sums after divided layers are counted under, of denoisers and of text encoders.
SUMS, ENCODER_SUMS = "tensor_sums", "encoder_sums"


def apply(model: nn.Module, spec: ModelSpec, group: dist.ProcessGroup) -> None:
    """Divide a denoiser, in place. All ranks of the group hold the same whole weights before.

    Raises:
        InvalidConfigError: the degree does not divide the model, or the model's layers are not understood.
    """
    if group.size() > 1:
        plan = _plan(model, "tensor_parallel_size", type(model).__name__, group.size(), vocabulary(spec.tensor_names))
        _divide(model, plan, group, SUMS)


def apply_encoder(encoder: nn.Module, group: dist.ProcessGroup, *, name: str) -> None:
    """Divide a text encoder, in place; `name` is its component's, for errors. Raises as `apply` does."""
    if group.size() > 1:
        title = f"{name} ({type(encoder).__name__})"
        plan = _plan(encoder, "text_encoder_tp_size", title, group.size(), Vocabulary())
        _divide(encoder, plan, group, ENCODER_SUMS)


def allowed_degrees(model: nn.Module, spec: ModelSpec | None = None) -> tuple[int, ...]:
    """The degrees that `apply` takes for a pristine model or encoder, ascending; (1,) if it cannot be divided."""
    try:
        plan = read(model, _words(spec))
    except UnknownLayerError:
        return (1,)
    return allowed(plan) if share(model, plan) >= SMALLEST_SHARE else (1,)


def cuts(model: nn.Module, spec: ModelSpec | None = None) -> dict[str, Layer]:
    """What `apply` cuts of a pristine model, by path; nothing of one that cannot be divided."""
    try:
        return {layer.path: layer for layer in read(model, _words(spec)).layers}
    except UnknownLayerError:
        return {}


def _words(spec: ModelSpec | None) -> Vocabulary:
    return Vocabulary() if spec is None else vocabulary(spec.tensor_names)


def _plan(model: nn.Module, field: str, title: str, degree: int, words: Vocabulary) -> Plan:
    """What is cut, all of it divisible. Raises InvalidConfigError."""
    assert not any(hasattr(module, "denoised_shard") for module in model.modules()), "divided already"
    plan = _read(model, f"{field}={degree}", title, words)
    indivisible = obstacle(plan, degree)
    if indivisible is not None:
        degrees = listed(allowed(plan))
        raise InvalidConfigError(f"{field}={degree} does not divide the {indivisible} of {title}; use {degrees}.")
    return plan


def _read(model: nn.Module, setting: str, title: str, words: Vocabulary) -> Plan:
    try:
        plan = read(model, words)
    except UnknownLayerError as unknown:
        text = f"{setting} would divide {unknown} of {title}, whose use its name does not tell; leave it at 1."
        raise InvalidConfigError(text) from None
    part = share(model, plan)
    if part < SMALLEST_SHARE:
        raise InvalidConfigError(f"{setting} would divide only {part:.0%} of the blocks of {title}; leave it at 1.")
    return plan


def _divide(model: nn.Module, plan: Plan, group: dist.ProcessGroup, counted: str) -> None:
    owners = {attention.path: attention for attention in plan.attentions}
    for layer in plan.layers:
        owner = next((owners[path] for path in owners if layer.path.startswith(f"{path}.")), None)
        shard = shards.shard_of(layer, owner, group.size(), group.rank())
        module = model.get_submodule(layer.path)
        shards.cut(module, shard)
        forwards.exchange(module, shard, group, counted)
    for attention in plan.attentions:
        module = model.get_submodule(attention.path)
        shards.divide_numbers(module, attention, group.size())
        shards.divide_scales(module, attention, group.size(), group.rank())
        forwards.slice_rotary(module, attention, group)
    for path in {layer.path.rpartition(".")[0] for layer in plan.layers if layer.role == "column"}:
        shards.divide_hidden(model.get_submodule(path), group.size())
