"""The only file that names private symbols of diffusers and transformers, or leans on undocumented behaviour.

`tests/test_hf.py` asserts that each exists, so that an upgrade fails there and not in a picture.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any


def components(pipeline: Any) -> dict[str, Any]:
    """Name to component of a pipeline, without those that are not loaded."""
    return {name: part for name, part in pipeline.components.items() if part is not None}


def stateful_components(pipeline: Any) -> dict[str, Any]:
    """Components that carry state across the steps of one call: schedulers and guiders, not modules or tokenizers."""
    return {name: part for name, part in components(pipeline).items() if _is_stateful(part)}


def _is_stateful(component: Any) -> bool:
    from diffusers import SchedulerMixin
    from diffusers.guiders.guider_utils import BaseGuidance
    from torch import nn

    return not isinstance(component, nn.Module) and isinstance(component, SchedulerMixin | BaseGuidance)


def execution_device(pipeline: Any) -> Any:
    """The device a pipeline draws its noise on and moves its inputs to."""
    return pipeline._execution_device


def set_config(pipeline: Any, **values: Any) -> None:
    """Change entries of a pipeline's configuration on this object only (a request's copy)."""
    pipeline.register_to_config(**values)


@contextlib.contextmanager
def quietly(*, bars: bool) -> Iterator[None]:
    """No advice from the libraries while a model loads; `bars` keeps their progress bars, for downloads."""
    import diffusers
    import transformers

    loggings = [diffusers.utils.logging, transformers.utils.logging]
    levels = [library.get_verbosity() for library in loggings]
    for library in loggings:
        library.set_verbosity_error()
        if not bars:
            library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(loggings, levels, strict=True):
            library.set_verbosity(level)
            if not bars:
                library.enable_progress_bar()


class _Taken(logging.Filter):
    """Keeps a record from being printed if somebody takes its message."""

    def __init__(self, take: Callable[[str], bool]) -> None:
        super().__init__()
        self._take = take

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or not self._take(record.getMessage())


def route_warnings(take: Callable[[str], bool]) -> None:
    """Offer the libraries' warnings to `take`; those that it returns True for are not printed."""
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(f, _Taken) for f in handler.filters):
                handler.addFilter(_Taken(take))


def subclasses(cls: type) -> list[type]:
    """All classes below `cls` that are imported by now."""
    children: list[type] = cls.__subclasses__()
    return children + [below for child in children for below in subclasses(child)]
