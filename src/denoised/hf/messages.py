"""What the libraries say, and to whom."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

# Said once a process where torchao is installed, which diffusers then imports: of compiled kernels and of classes for
# old checkpoints, neither of which is used here. Logger, and words of the message.
_EXPECTED = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass ",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


class _Taken(logging.Filter):
    """Keeps a record from being printed if somebody takes its message."""

    def __init__(self, take: Callable[[str], bool]) -> None:
        super().__init__()
        self._take = take

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or not self._take(record.getMessage())


def expect_messages_of_imports() -> None:
    """Keep these messages, and no others, from being printed. Done when this package is imported: import it first."""
    for name, words in _EXPECTED.items():
        _filter(logging.getLogger(name), functools.partial(_has, words))


def route_warnings(take: Callable[[str], bool]) -> None:
    """Offer the libraries' warnings to `take`; those that it returns True for are not printed."""
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            _filter(handler, take)


def _has(words: str, text: str) -> bool:
    return words in text


def _filter(place: logging.Filterer, take: Callable[[str], bool]) -> None:
    if not any(isinstance(known, _Taken) for known in place.filters):
        place.addFilter(_Taken(take))


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
