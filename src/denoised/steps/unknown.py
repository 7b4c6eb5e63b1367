"""Tensors whose values nobody has: what a program gets in place of what it computed in an earlier run.

An `Unknown` has shape, dtype and device, and NaN where it is not known. Arithmetic carries the NaN on, so that what a
value really depends on shows by itself: a slice that came from elsewhere is known, although the rest is not. Whoever
needs a value asks `known`; operations that could hide a NaN, or that decide by a value, ask it too. A program that
needs what is not there is never given something else: `NeedsValue` unwinds it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch

from denoised.steps.functions import LAZY_METHODS, RANDOM_FUNCTIONS


class NeedsValue(BaseException):
    """A program looked at a value that is not there. Not an Exception, so that pipelines do not catch it."""


class MissingValueError(RuntimeError):
    """A program ended because it needed a value that is not there; it must be run from the start."""


# Of floating tensors to floating tensors, with NaN wherever an element depends on a NaN.
_CARRY = LAZY_METHODS | frozenset(
    "__add__ __getitem__ __radd__ __rdiv__ __rmatmul__ __rmul__ __rpow__ __rsub__ __rtruediv__ addcdiv addcmul amax "
    "amin avg_pool2d avg_pool3d bmm broadcast_to cat clamp_max clamp_min clip concat concatenate conj cos cumsum "
    "div einsum expand_as flip gather hstack index_select interpolate layer_norm lerp linalg_vector_norm linear log "
    "masked_fill matmul max_pool2d maximum minimum moveaxis pad reciprocal reshape_as roll rsqrt select "
    "sigmoid sin softmax split_with_sizes stack swapaxes swapdims t tanh tensor_split true_divide unbind unfold "
    "var_mean std_mean view_as vstack where __deepcopy__ multiply divide subtract".split()
)
_IN_PLACE = frozenset(
    "__iadd__ __imul__ __isub__ __itruediv__ __setitem__ add_ addcmul_ clamp_ copy_ div_ fill_ lerp_ masked_fill_ "
    "mul_ neg_ sub_ zero_".split()
)
# What does not depend on values.
_SHAPES = frozenset(
    "__len__ __format__ __repr__ dim element_size get_device is_complex is_contiguous is_floating_point is_inference "
    "ndimension nelement numel size stride type".split()
)
_LIKE = RANDOM_FUNCTIONS & frozenset("rand_like randint_like randn_like".split()) | frozenset(
    "empty_like full_like new_empty new_full new_ones new_tensor new_zeros ones_like zeros_like".split()
)


class Unknown(torch.Tensor):
    """A floating tensor with NaN where it is not known."""

    _may_guess = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not all(issubclass(kind, torch.Tensor) for kind in types):
            return NotImplemented  # a Deferred among them: it is recorded, and evaluated later
        kwargs, name = kwargs or {}, func.__name__
        if name in _LIKE:
            return _plainly(func, args, kwargs)
        if name not in _CARRY | _IN_PLACE | _SHAPES | {"__get__", "__set__"}:
            return _plainly(func, args, kwargs) if cls._may_guess else func(*known(args), **known(kwargs))
        result = _plainly(func, args, kwargs)
        if name in _IN_PLACE and isinstance(args[0], torch.Tensor):
            _mark(args[0], cls)
        return result if name in _SHAPES else _carried(result, cls, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return known(self).__reduce_ex__(protocol)


class Guess(Unknown):
    """An unknown that a program may decide by, wrongly: where its way to the end does not matter, as in a preview."""

    _may_guess = True


def unknown(shape: tuple[int, ...], dtype: torch.dtype, device: Any, kind: type[Unknown] = Unknown) -> Unknown:
    """A tensor of which nothing but this is known.

    Raises:
        NeedsValue: a dtype that has no NaN.
    """
    if not dtype.is_floating_point:
        raise NeedsValue(f"a tensor of {dtype} cannot be left open")
    return torch.full(shape, torch.nan, dtype=dtype, device=device).as_subclass(kind)


def known(value: Any) -> Any:
    """`value` with plain tensors in it.

    Raises:
        NeedsValue: something in it is not known.
    """
    return _each(value, _known)


def stripped(value: Any) -> Any:
    """`value` with plain tensors in it, NaN and all."""
    return _each(value, _strip)


def _known(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, Unknown):
        return tensor
    tensor = _strip(tensor)
    if torch.isnan(tensor).any():
        raise NeedsValue("the pipeline looks at a prediction, or at latents, of a step that was not run again")
    return tensor


def _strip(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor) if isinstance(tensor, Unknown) else tensor


def _plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return stripped(func(*args, **kwargs))


def _carried(result: Any, kind: type[Unknown], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gave, still open; numbers of another kind have no NaN, so their sources must be known."""

    def carry(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.as_subclass(kind)
        if not kind._may_guess:
            known((args, kwargs))
        return tensor

    return _each(result, carry)


def _mark(tensor: torch.Tensor, kind: type[Unknown]) -> None:
    """Something open may have been written into a plain tensor: from here on it is open too."""
    if type(tensor) is torch.Tensor and tensor.is_floating_point():
        tensor.__class__ = kind
    elif not isinstance(tensor, Unknown):
        raise NeedsValue(f"the pipeline writes values that are not there into a {type(tensor).__name__}")


def _each(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`function` of every tensor in lists, tuples, dicts and output classes; what it leaves alone stays as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        items = [_each(item, function) for item in value]
        return value if all(map(operator.is_, items, value)) else _rebuilt(value, items)
    if isinstance(value, dict):
        found = {key: _each(item, function) for key, item in value.items()}
        changed = {key: item for key, item in found.items() if item is not value[key]}
        return with_items(value, changed) if changed else value
    return value


def with_items(value: dict[str, Any], items: dict[str, Any]) -> Any:
    """A mapping of the same class with some of its items replaced: output classes are dicts with fields."""
    other = copy.copy(value)
    for key, item in items.items():
        other[key] = item
    return other


def _rebuilt(value: Any, items: list[Any]) -> Any:
    """Named tuples, and torch's own return types, too."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
