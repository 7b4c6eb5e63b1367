"""What features say to a model before anything is loaded: they are asked, with ranks that are a number.

A copy of each component on the meta device is cut as the engine would cut it; what is refused is refused here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from denoised.errors import InvalidConfigError
from denoised.features import expert, hsdp, sequence, tensor, vae_patch
from denoised.features.sequence.spread import STRICT, UNEVEN
from denoised.runtime.planning.facts import Limits
from denoised.spec.blocks import stacks
from denoised.spec.experts import EXPERTS, NUM_EXPERTS
from denoised.spec.model_spec import ModelSpec
from denoised.spec.sequence import plan_of

# Degrees that are asked about.
MOST = 64


class _Paper:
    """Stands for a process group, or a mesh of one axis: features ask how many ranks there are and which this is."""

    ndim = 1

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def size(self, _: int = 0) -> int:
        return self._num_ranks

    def rank(self) -> int:
        return 0


_ALONE, _TWO = _Paper(1), _Paper(2)


def limits(model: nn.Module, spec: ModelSpec) -> Limits:
    """Of a pristine denoiser on the meta device; it stays as it is."""
    dealt, experts = _dealt(model, spec, tensor=_TWO, sequence=_ALONE)
    return Limits(
        num_blocks=sum(len(stack.blocks) for stack in stacks(model, spec.stacks)),
        tensor=tensor.allowed_degrees(model, spec),
        tensor_beside_experts=tensor.allowed_degrees(dealt, spec),
        num_experts=_num_experts(model),
        experts=experts,
        spread_experts=_dealt(model, spec, tensor=_ALONE, sequence=_TWO)[1],
        sequence=_refusal(lambda: _spread(model, spec, 2, UNEVEN)),
        ulysses=tuple(n for n in range(1, MOST + 1) if _deals_heads(model, spec, n)),
        fixed_lengths=_streams(model, spec) == 1,
        hsdp=hsdp_refusal(model),
    )


def encoder_degrees(encoder: nn.Module) -> tuple[int, ...]:
    """Ranks that can share the matrices of a text encoder."""
    return tensor.allowed_degrees(encoder)


def hsdp_refusal(model: Any) -> str | None:
    """Why the weights of a component cannot be sharded."""
    return _refusal(lambda: hsdp.check(model, _any(_TWO)))


def vae_refusal(pipeline: Any) -> str | None:
    """Why tiles of the VAE cannot be dealt."""
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, nn.Module):
        return f"{type(pipeline).__name__} has no component named vae"
    return _refusal(lambda: vae_patch.apply(without_values(vae), _any(_TWO)))


def without_values(module: nn.Module) -> nn.Module:
    """A copy on the meta device: features may cut it, and it takes no memory."""
    parts = [value for part in module.modules() for value in vars(part).values()]
    tensors = [*module.parameters(), *module.buffers(), *(part for part in parts if isinstance(part, Tensor))]
    return copy.deepcopy(module, {id(tensor): _without_value(tensor) for tensor in tensors})


def _without_value(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # in its likeness it would be read
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _any(paper: Any) -> Any:
    return paper


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except InvalidConfigError as error:
        return str(error)
    return None


def _dealt(model: nn.Module, spec: ModelSpec, **groups: Any) -> tuple[nn.Module, str | None]:
    """A copy with its experts dealt, or the model itself and why they cannot be."""
    if not _num_experts(model):  # no copy of a large model, only to hear that
        return model, _refusal(lambda: expert.apply(model, spec, **groups))
    dealt = without_values(model)
    refusal = _refusal(lambda: expert.apply(dealt, spec, **groups))
    return (model, refusal) if refusal else (dealt, None)


def _num_experts(model: nn.Module) -> int:
    """The fewest that a mixture has; 0 without one."""
    found = (module._modules.get(EXPERTS) for module in model.modules())
    counts = [len(e) if isinstance(e, nn.ModuleList) else getattr(e, NUM_EXPERTS, 0) for e in found if e is not None]
    return min((count for count in counts if count > 1), default=0)


def _spread(model: nn.Module, spec: ModelSpec, size: int, mode: str) -> None:
    sequence.check(model, spec, ring=_any(_ALONE), ulysses=_any(_Paper(size)), mode=mode)


def _deals_heads(model: nn.Module, spec: ModelSpec, size: int) -> bool:
    return _refusal(lambda: _spread(model, spec, size, STRICT)) is None


def _streams(model: nn.Module, spec: ModelSpec) -> int:
    """Sequences that are cut: more than one means that the prompt's is among them."""
    plan = plan_of(model, spec.sequence_plan)
    return 0 if plan is None else len({cut.stream for cut in plan.cuts if cut.stream})
