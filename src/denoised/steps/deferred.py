"""A value that is looked at later: what a denoiser call returns while its task runs on.

The program may index it, do arithmetic with it, or hand it to torch functions; each such use is recorded and gives
another Deferred. Whatever needs the value (control flow, `scheduler.step`, a shape) forces it: the task stops until
the engine has resolved the calls it depends on, then the recorded operations run, on the task's own thread.

This file does not know what a call is or who computes it: a `Source` is resolved by somebody else.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from denoised.steps import outline
from denoised.steps.ambient import Ambient
from denoised.steps.functions import LAZY_FIELDS, LAZY_METHODS, OUTLINED, changes_state
from denoised.steps.outline import Outline


class Versions:
    """The tensors of some arguments, to tell later whether they were changed in place.

    Inference tensors carry no version counter; a program in inference mode therefore does not defer (see `Task.trap`).
    """

    __slots__ = ("_seen",)

    def __init__(self, value: Any) -> None:
        leaves = (leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor) and not leaf.is_inference())
        self._seen = [(tensor, tensor._version) for tensor in leaves]

    @property
    def changed(self) -> bool:
        return any(tensor._version != version for tensor, version in self._seen)


class Source:
    """The result of one suspended call. `wait` stops the task; the engine calls `resolve` or `fail`."""

    __slots__ = ("_error", "_value", "_wait", "done", "outline")

    def __init__(self, wait: Callable[[], None], arity: int | Outline | None = None) -> None:
        self._wait, self.outline, self.done = wait, outline.of_length(arity), False
        self._value: Any = None
        self._error: BaseException | None = None

    def resolve(self, value: Any) -> None:
        self._value, self.done = value, True

    def fail(self, error: BaseException) -> None:
        self._error, self.done = error, True

    def get(self) -> Any:
        while not self.done:
            self._wait()
        if self._error is not None:
            raise self._error
        return self._value


class Deferred:
    """A recorded expression over the results of suspended calls."""

    __slots__ = ("_ambient", "_args", "_fn", "_kwargs", "_outline", "_ready", "_told", "_value", "_versions")
    __array_ufunc__ = None  # numpy scalars on the left leave the operation to us
    __hash__ = object.__hash__

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outline: Outline | None
    ) -> None:
        self._fn, self._args, self._kwargs, self._outline = fn, known(args), known(kwargs), outline
        self._ready, self._value, self._told = False, None, dict[str, Any]()
        # Of the arguments until this is evaluated, of the value from then on.
        self._versions = Versions((self._args, self._kwargs))
        self._ambient = Ambient.capture()

    @classmethod
    def of(cls, source: Source) -> Deferred:
        """The Deferred of a call's own result."""
        return cls(source.get, (), {}, source.outline)

    @property
    def is_call_result(self) -> bool:
        """Whether this is what a call returned, a model output or tuple, and not something computed from it."""
        return isinstance(getattr(self._fn, "__self__", None), Source)

    def force(self) -> Any:
        """The value; stops the task until the calls it depends on are computed."""
        if not self._ready:
            args, kwargs = plain(self._args), plain(self._kwargs)
            waited_for = (d for d in _leaves((self._args, self._kwargs)) if isinstance(d, Deferred))
            if self._versions.changed or any(d._versions.changed for d in waited_for):
                raise RuntimeError(
                    "a tensor was changed in place between a recorded use of a prediction and its evaluation; "
                    "set defer=False in the model's spec"
                )
            self._value, self._ready = self._evaluated(args, kwargs), True
            self._check_told()
            self._fn, self._args, self._kwargs, self._versions = _spent, (), {}, Versions(self._value)
        return self._value

    def _check_told(self) -> None:
        wrong = [name for name, told in self._told.items() if getattr(self._value, name) != told]
        if wrong:
            raise RuntimeError(
                f"a prediction has another {wrong[0]} than the one before it; set defer=False in the model's spec"
            )

    def _evaluated(self, args: Any, kwargs: Any) -> Any:
        """Under the autocast and gradient state in which the operation was written."""
        if self.is_call_result or self._ambient == Ambient.capture():
            return self._fn(*args, **kwargs)
        with self._ambient.restored():
            return self._fn(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if changes_state(name) or any((kwargs or {}).get(key) is not None for key in ("out", "generator")):
            return func(*plain(args), **plain(kwargs or {}))
        return record(func, args, kwargs or {}, outline.of_split(name, args, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in LAZY_METHODS:
            return partial(_method, name, self)
        if name in LAZY_FIELDS:
            return record(getattr, (self, name), {})
        if name in OUTLINED and not self._ready and (told := getattr(self._outline, name, None)) is not None:
            return self._told.setdefault(name, told)
        return getattr(self.force(), name)

    def __getitem__(self, index: Any) -> Any:
        if self._ready or self._outline is None or type(index) is not int:
            return record(operator.getitem, (self, index), {})
        part = self._outline.part(index)
        return None if part is not None and part.nothing else record(operator.getitem, (self, index), {}, part)

    def __iter__(self) -> Iterator[Any]:
        parts = self._parts()
        return iter(self.force() if parts is None else [self[i] for i in range(len(parts))])

    def __len__(self) -> int:
        parts = self._parts()
        return len(self.force() if parts is None else parts)

    def _parts(self) -> tuple[Outline | None, ...] | None:
        return None if self._ready or self._outline is None else self._outline.parts

    def __bool__(self) -> bool:
        return bool(self.force())

    def __float__(self) -> float:
        return float(self.force())

    def __int__(self) -> int:
        return int(self.force())

    def __index__(self) -> int:
        return operator.index(self.force())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.force().__array__(*args, **kwargs)

    def __copy__(self) -> Any:
        return copy.copy(self.force())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.force(), memo)

    def __contains__(self, item: Any) -> bool:
        return item in self.force()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.force()[plain(index)] = plain(value)

    def __repr__(self) -> str:
        return f"Deferred({self._value!r})" if self._ready else "Deferred(pending)"


def record(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outline: Outline | None = None
) -> Any:
    """`fn(*args, **kwargs)` as a Deferred, or its value at once if nothing in it is pending."""
    if any(not d._ready for d in _leaves((args, kwargs)) if isinstance(d, Deferred)):
        return Deferred(fn, args, kwargs, outline)
    return fn(*plain(args), **plain(kwargs))


def known(value: Any) -> Any:
    """`value` with every Deferred in it that is evaluated already replaced by what it stands for at this moment."""
    if isinstance(value, Deferred):
        return value._value if value._ready else value
    if type(value) in (list, tuple):
        return type(value)(known(item) for item in value)
    if type(value) is dict:
        return {key: known(item) for key, item in value.items()}
    return value


def settled(result: Any) -> Any:
    """The result of a whole program: nothing in it waits any more, fields of output classes included."""
    if isinstance(result, dict) and type(result) is not dict:
        fields: dict[str, Any] = result
        assign = result.__setitem__
    elif isinstance(result, Deferred | tuple) or not hasattr(result, "__dict__"):
        return plain(result)
    else:
        fields, assign = vars(result), partial(setattr, result)
    for name, value in list(fields.items()):
        if any(isinstance(leaf, Deferred) for leaf in _leaves(value)):
            assign(name, plain(value))
    return result


def plain(value: Any) -> Any:
    """`value` with every Deferred in it (lists, tuples and dicts included) forced."""
    if isinstance(value, Deferred):
        return plain(value.force())
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) in (list, tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _spent(*_: Any) -> Any:
    raise AssertionError("a Deferred is evaluated once")


def _method(name: str, self: Deferred, *args: Any, **kwargs: Any) -> Any:
    return record(_call(name), (self, *args), kwargs, outline.of_split(name, (self, *args), kwargs))


def _call(name: str) -> Callable[..., Any]:
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: record(function, (self, other), {})


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: record(function, (other, self), {})


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`prediction += x` changes the tensor that other names of it see too, so it happens now."""

    def change(self: Deferred, other: Any) -> Any:
        return function(self.force(), plain(other))

    return change


def _unary(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: record(function, (self,), {})


def _install_operators() -> None:
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
        function = getattr(operator, name)
        setattr(Deferred, f"__{name}__", _binary(function))
        setattr(Deferred, f"__r{name}__", _reflected(function))
        setattr(Deferred, f"__i{name}__", _in_place(getattr(operator, f"i{name}")))
    for name in ("lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor"):
        setattr(Deferred, f"__{name.rstrip('_')}__", _binary(getattr(operator, name)))
    for name in ("pos", "neg", "abs", "invert"):
        setattr(Deferred, f"__{name}__", _unary(getattr(operator, name)))


_install_operators()
