"""Private parts of pipelines and their components: what a call changes, where it runs, what it is made of."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any


def components(pipeline: Any) -> dict[str, Any]:
    """Name to component of a pipeline, without those that are not loaded.

    `pipeline.components` leaves out what a constructor has a default for, even if it is there.
    """
    known = pipeline.components
    others = {name: vars(pipeline).get(name) for name in vars(pipeline).get("_internal_dict", ()) if name not in known}
    found = {**known, **{name: part for name, part in others.items() if _is_component(part)}}
    return {name: part for name, part in found.items() if part is not None}


def _is_component(part: Any) -> bool:
    from diffusers import SchedulerMixin
    from torch import nn

    return isinstance(part, nn.Module | SchedulerMixin)


def text_encoders(pipeline: Any) -> dict[str, Any]:
    """Name to module of all that reads text, each module once: by its name, or because its class takes tokens first.

    Language models that write prompts or coarse pictures are among them, and encoders of pictures are not.
    """
    found = {id(part): (name, part) for name, part in reversed(components(pipeline).items()) if reads_text(name, part)}
    return dict(reversed(found.values()))


def reads_text(name: str, part: Any) -> bool:
    """Whether a component is a text encoder."""
    from torch import nn
    from transformers import PreTrainedModel

    takes_tokens = isinstance(part, PreTrainedModel) and part.main_input_name == "input_ids"
    return isinstance(part, nn.Module) and (takes_tokens or name.startswith("text_encoder"))


def stateful_components(pipeline: Any) -> dict[str, Any]:
    """Components that carry state across the steps of one call: schedulers and guiders, not modules or tokenizers."""
    return {name: part for name, part in components(pipeline).items() if _is_stateful(part)}


def _is_stateful(component: Any) -> bool:
    from diffusers import SchedulerMixin
    from diffusers.guiders.guider_utils import BaseGuidance
    from torch import nn

    return not isinstance(component, nn.Module) and isinstance(component, SchedulerMixin | BaseGuidance)


# What pipelines call to change how a module attends, for all who share it.
_CHANGES = frozenset(
    "set_attn_processor _set_pag_attn_processor register_attention_control enable_fuser _set_ar_attention".split()
)


def changes_modules(pipeline: Any) -> bool:
    """Whether a pipeline's call changes modules that other requests use meanwhile. Told from the names in it."""
    call = inspect.unwrap(type(pipeline).__call__)
    return not _CHANGES.isdisjoint(call.__code__.co_names)


@contextlib.contextmanager
def same_processors(pipeline: Any) -> Iterator[None]:
    """However the block ends, modules attend as they did before it: a cancelled call does not tidy up."""
    parts = [part for part in components(pipeline).values() if hasattr(part, "set_attn_processor")]
    before = [dict(part.attn_processors) for part in parts]
    try:
        yield
    finally:
        for part, processors in zip(parts, before, strict=True):
            part.set_attn_processor(processors)


def inner_pipelines(pipeline: Any) -> dict[str, Any]:
    """Pipelines that a pipeline is made of and calls in turn, by attribute."""
    from diffusers import DiffusionPipeline

    return {name: value for name, value in vars(pipeline).items() if isinstance(value, DiffusionPipeline)}


def execution_device(pipeline: Any) -> Any:
    """The device a pipeline draws its noise on and moves its inputs to."""
    return pipeline._execution_device


def set_config(pipeline: Any, **values: Any) -> None:
    """Change entries of a pipeline's configuration on this object only (a request's copy)."""
    pipeline.register_to_config(**values)


def output_class(name: str) -> type | None:
    """The output class of diffusers with this full name, if it is imported by now."""
    from diffusers.utils import BaseOutput

    return next((c for c in subclasses(BaseOutput) if f"{c.__module__}.{c.__qualname__}" == name), None)


def subclasses(cls: type) -> list[type]:
    """All classes below `cls` that are imported by now."""
    children: list[type] = cls.__subclasses__()
    return children + [below for child in children for below in subclasses(child)]
