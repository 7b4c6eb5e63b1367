"""Which adapter a request asks for, and how strongly: as callers say it, and as it travels to the ranks.

Nothing here reads a file or imports torch. Names are those of vLLM, so that scripts move over by their imports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from denoised.checks import unknown_names
from denoised.errors import InvalidRequestError

# Beyond it a picture is noise; it is there to catch slips, such as a percentage.
MAX_SCALE = 100.0
# Other words for the fields of a LoRARequest, in bodies and dicts.
_SYNONYMS = {
    "name": "lora_name",
    "path": "lora_path",
    "local_path": "lora_path",
    "lora_local_path": "lora_path",
    "int_id": "lora_int_id",
    "lora_scale": "scale",
}


@dataclass(frozen=True)
class LoRARequest:
    """One adapter of a request. Positional, as in vLLM: `LoRARequest("style", 1, "/adapters/style")`.

    Args:
        lora_name: what receipts call it; alone it names an adapter that is loaded already.
        lora_int_id: taken for scripts written for vLLM; adapters are told apart by their files.
        lora_path: a safetensors file, a folder that holds one, or a hub id; "": it is loaded under its name.
        scale: strength; a request's `lora_scale` multiplies it.
        component: the denoiser that it is for, such as transformer_2, where the file does not say; None: the first.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    scale: float = 1.0
    component: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("lora_name", str), ("lora_int_id", int), ("lora_path", str)):
            if not isinstance(getattr(self, name), kind):
                raise InvalidRequestError(f"{name}={getattr(self, name)!r:.80}: must be of type {kind.__name__}.")
        if not isinstance(self.component, str | None):
            raise InvalidRequestError(f"component={self.component!r:.80}: must be of type str.")
        check_scale(self.scale, "scale")
        if not (self.lora_name or self.lora_path):
            raise InvalidRequestError("lora_request names neither a loaded adapter nor a path; give one of them.")


def check_scale(value: Any, field: str) -> None:
    """Raises InvalidRequestError unless `value` is a strength that can be meant."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or abs(value) > MAX_SCALE:
        raise InvalidRequestError(f"{field}={value!r:.40}: must be a number between {-MAX_SCALE:g} and {MAX_SCALE:g}.")


def as_lora_requests(value: Any) -> tuple[LoRARequest, ...]:
    """What a `lora_request` field holds: nothing, a name or path, a LoRARequest or a dict like it, or several.

    Raises:
        InvalidRequestError: it holds something else.
    """
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(one for item in value for one in as_lora_requests(item))
    return (_one(value),)


def _one(value: Any) -> LoRARequest:
    if isinstance(value, LoRARequest):
        return value
    if isinstance(value, str):
        return LoRARequest(value, lora_path=value if "/" in value else "")
    if isinstance(value, dict):
        return _of_dict(value)
    if hasattr(value, "lora_name") and hasattr(value, "lora_path"):  # vLLM's own class
        return LoRARequest(value.lora_name, lora_path=value.lora_path)
    raise InvalidRequestError(
        f"lora_request={value!r:.60}: must be a LoRARequest, a name of a loaded adapter, a path, or a list of them."
    )


def _of_dict(value: dict[Any, Any]) -> LoRARequest:
    given = {_SYNONYMS.get(str(key), str(key)): item for key, item in value.items() if item is not None}
    problem = unknown_names(given, LoRARequest.__dataclass_fields__, "lora_request key")
    if problem:
        raise InvalidRequestError(problem)
    if len(given) != len([item for item in value.values() if item is not None]):
        raise InvalidRequestError("lora_request gives one of its keys under two names; give it once.")
    return LoRARequest(**{"lora_name": given.get("lora_path", "")} | given)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One adapter as it travels to the ranks.

    path: of the file. stamp: its bytes and time of change in ns, so that a file that was replaced is read anew.
    """

    name: str
    path: str
    stamp: tuple[int, int]
    scale: float = 1.0
    component: str | None = None

    @property
    def source(self) -> tuple[str, tuple[int, int], str | None]:
        """Equal for what is the same weights."""
        return self.path, self.stamp, self.component

    @property
    def place(self) -> tuple[str, str | None]:
        """The same, whatever the file held at the time."""
        return self.path, self.component

    def told(self) -> dict[str, Any]:
        """As plain values that `as_lora_requests` takes back."""
        return {
            "lora_name": self.name,
            "lora_path": self.path,
            "scale": self.scale,
            "component": self.component,
        }
