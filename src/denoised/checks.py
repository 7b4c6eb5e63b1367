"""Range and type checks shared by every configuration dataclass: a field carries its own bounds as metadata.

    num_inference_steps: int | None = bounded(None, minimum=1, maximum=1000, help="denoising steps")

`check_fields(self)` in `__post_init__` then refuses a wrong value with the field, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from denoised.errors import InvalidConfigError


def bounded(
    default: Any,
    *,
    help: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with its allowed range in its metadata."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(instance: Any, error: type[Exception] = InvalidConfigError) -> None:
    """Raise `error` for the first field of a dataclass whose value has a wrong type or is out of range."""
    hints = _hints(type(instance))
    for field in dataclasses.fields(instance):
        problem = _problem(getattr(instance, field.name), hints[field.name], field.metadata)
        if problem:
            raise error(f"{field.name}={getattr(instance, field.name)!r:.80}: {problem}.")


def _hints(cls: type) -> dict[str, Any]:
    return {name: _plain_types(hint) for name, hint in typing.get_type_hints(cls).items()}


def _plain_types(hint: Any) -> tuple[type, ...] | None:
    """The classes an annotation admits, or None where any value is allowed."""
    if hint is Any:
        return None
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_plain_types(part) for part in typing.get_args(hint)]
        return None if None in parts else tuple(t for part in parts if part for t in part)
    if typing.get_origin(hint) is typing.Literal:
        return (str,)
    return (typing.get_origin(hint) or hint,)


def _problem(value: Any, allowed: tuple[type, ...] | None, metadata: Any) -> str | None:
    if value is None:
        return None if allowed is None or types.NoneType in allowed else "must be set"
    if allowed is not None and not _is_a(value, allowed):
        return f"must be of type {' or '.join(t.__name__ for t in allowed if t is not types.NoneType)}"
    choices = metadata.get("choices")
    if choices and value not in choices:
        return f"must be one of {', '.join(choices)}"
    if isinstance(value, list) and allowed is not None:
        return _bad_numbers(value)
    return _out_of_range(value, metadata.get("minimum"), metadata.get("maximum"))


def _bad_numbers(values: list[Any]) -> str | None:
    """Lists are schedules: numbers, at least one of them."""
    if not values:
        return "must hold at least one number"
    problems = (_out_of_range(v, None, None) if _is_a(v, (int, float)) else "must hold numbers" for v in values)
    return next(filter(None, problems), None)


def _is_a(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, (*allowed, int) if float in allowed else allowed)


def _out_of_range(value: Any, minimum: float | None, maximum: float | None) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return "must be a finite number"
    if minimum is not None and value < minimum:
        return f"must be at least {minimum}"
    if maximum is not None and value > maximum:
        return f"must be at most {maximum}"
    return None


def unknown_names(given: Iterable[str], known: Iterable[str], what: str) -> str | None:
    """One sentence that names the first unknown keyword and the nearest known one, or None."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            return f"{what} {name!r} is not known" + (f"; did you mean {near[0]!r}?" if near else ".")
    return None
