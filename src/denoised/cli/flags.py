"""Flags made from the fields of the configuration dataclasses: name, type, bounds and help are declared there alone.

Values that the command line leaves out stay out, so that the dataclass's default, or the model's own, applies.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidConfigError
from denoised.request import OmniDiffusionSamplingParams

# Names that users know beside the field's own; the first is the one that help shows.
SPELLINGS = {
    "ulysses_degree": ("--usp", "--ulysses-degree"),
    "ring_degree": ("--ring", "--ring-degree"),
    "num_outputs_per_prompt": ("--num-images-per-prompt", "--num-outputs-per-prompt"),
    "enable_multithread_weight_load": ("--disable-multithread-weight-load",),
}
# The flag switches the field off.
NEGATED = frozenset({"enable_multithread_weight_load"})
# Fields that hold live objects, that the command line sets itself, or that are settings of the engine too.
NOT_FLAGS = frozenset(
    (
        *("parallel_config", "generator", "latents", "pil_image", "lora_request", "output_type"),
        *("return_trajectory_latents", "enable_frame_interpolation", "frame_interpolation_exp"),
        *("frame_interpolation_scale", "frame_interpolation_model_path"),
    )
)
JSON = (dict, list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One field as a flag."""

    name: str
    spellings: tuple[str, ...]
    kind: type
    panel: str
    help: str

    def parameter(self) -> inspect.Parameter:
        """The flag as a parameter of a command function."""
        metavar = "JSON" if self.kind in JSON else None
        option = typer.Option(*self.spellings, help=self.help, rich_help_panel=self.panel, metavar=metavar)
        plain: Any = {dict: str, list: str, tuple: list[str]}.get(self.kind, self.kind)  # type: ignore[call-overload]
        hint = bool if self.kind is bool else plain | None
        default = False if self.kind is bool else None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
        )

    def value(self, given: Any) -> Any:
        """What the field gets."""
        if self.name in NEGATED:
            return False
        if self.kind is tuple:
            return tuple(given)
        return _parsed(self.spellings[0], given, self.kind) if self.kind in JSON else given


def flags(owner: type, panel: str, *, without: Iterable[str] = ()) -> dict[str, Flag]:
    """The flags of a dataclass, by field name."""
    hints = typing.get_type_hints(owner)
    left_out = NOT_FLAGS | set(without)
    return {f.name: _flag(f, hints[f.name], panel) for f in dataclasses.fields(owner) if f.name not in left_out}


def _flag(field: dataclasses.Field[Any], hint: Any, panel: str) -> Flag:
    return Flag(
        name=field.name,
        spellings=SPELLINGS.get(field.name, ("--" + field.name.replace("_", "-"),)),
        kind=_kind(hint),
        panel=panel,
        help=_help(field),
    )


def _help(field: dataclasses.Field[Any]) -> str:
    text, choices = field.metadata["help"], field.metadata["choices"]
    if field.name in NEGATED:
        return f"do not {text}"
    text += f"; one of {', '.join(choices)}" if choices else ""
    if field.default in (None, False, (), dataclasses.MISSING) or "default" in text:
        return str(text)
    return f"{text} (default: {field.default})"


def _kind(hint: Any) -> type:
    """int, float, bool or str; dict or list, which are written as JSON; tuple: a flag that may be repeated."""
    if isinstance(hint, types.UnionType):
        return _kind(next(part for part in typing.get_args(hint) if part is not types.NoneType))
    if hint is Any:
        return str
    kind: type = typing.get_origin(hint) or hint
    return kind


def _parsed(spelling: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        example = '{"name": 1}' if kind is dict else "[1.0, 0.5]"
        raise InvalidConfigError(f"{spelling} {text!r:.80}: must be JSON such as '{example}'.")
    return value


ENGINE = flags(EngineConfig, "Engine")
PARALLEL = flags(DiffusionParallelConfig, "Ranks")
SAMPLING = flags(OmniDiffusionSamplingParams, "Sampling", without=ENGINE)


def given(table: dict[str, Flag], values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `table` that the command line set, with their values."""
    chosen = {name: values[name] for name in table if values[name] is not None and values[name] is not False}
    return {name: table[name].value(value) for name, value in chosen.items()}


def with_flags(*tables: dict[str, Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the flags of `tables` instead of a command function's `**values`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [flag for table in tables for flag in table.values()]
        parameters = [*own, *(flag.parameter() for flag in made)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate
