"""Sequence parallelism: each rank computes its tokens, and attention exchanges what it needs (Ulysses, ring, both).

A plan (`spec/sequence.py`) says where tensors are cut and where the result is gathered; this package wraps the
`forward`s of those modules. A forward that is cut and exchanges nothing is an error: its result would be wrong.
"""

from __future__ import annotations

from torch import nn

from denoised.attention.sharded import Axes
from denoised.errors import InvalidConfigError
from denoised.features.sequence.modules import attention_modules
from denoised.features.sequence.spread import STRICT, UNEVEN, WAY_OUT, Spread
from denoised.spec.model_spec import ModelSpec
from denoised.spec.sequence import plan_of
from denoised.steps.collectives import Group


def apply(model: nn.Module, spec: ModelSpec, *, ring: Group, ulysses: Group, mode: str) -> None:
    """Spread the sequence of every forward of `model` over `ring` x `ulysses`; inputs and outputs are whole.

    Raises:
        InvalidConfigError: the model has no plan that works, or its heads cannot be dealt evenly in mode "strict".
    """
    spread = _checked(model, spec, Axes(ring=ring, ulysses=ulysses), mode)
    if spread is not None:
        spread.wrap()


def check(model: nn.Module, spec: ModelSpec, *, ring: Group, ulysses: Group, mode: str) -> None:
    """What `apply` refuses, with nothing changed and no weight read. Raises InvalidConfigError."""
    _checked(model, spec, Axes(ring=ring, ulysses=ulysses), mode)


def _checked(model: nn.Module, spec: ModelSpec, axes: Axes, mode: str) -> Spread | None:
    """What spreads the model; None where there is one rank."""
    if axes.size == 1:
        return None
    plan = plan_of(model, spec.sequence_plan)
    if plan is None:
        raise InvalidConfigError(_no_plan(type(model).__name__, axes))
    if mode == STRICT:
        _check_heads(model, axes.ulysses.size())
    spread = Spread(model, plan, axes, mode)
    spread.check()
    return spread


def _no_plan(name: str, axes: Axes) -> str:
    degrees = f"ulysses_degree={axes.ulysses.size()}, ring_degree={axes.ring.size()}"
    return (
        f"{degrees}: nothing says how the sequence of {name} can be cut; {WAY_OUT}, "
        "or declare ModelSpec.sequence_plan."
    )


def _check_heads(model: nn.Module, size: int) -> None:
    for _, module in attention_modules(model):
        heads = getattr(module, "heads", None)
        if isinstance(heads, int) and heads % size:
            allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise InvalidConfigError(
                f"ulysses_degree={size} does not divide the {heads} heads of {type(model).__name__}; "
                f"use one of {', '.join(allowed)}, or ulysses_mode={UNEVEN}."
            )
