"""Whose fault an error was, in one word (`error_kind`).

Errors of other ranks come as text, so that text decides too.
"""

from __future__ import annotations

from denoised.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
)
from denoised.outputs import ErrorKind, OmniRequestOutput
from denoised.request import Request

# torch's words, on CUDA and on the CPU; the last is Python's own.
_OUT_OF_MEMORY = (
    *("OutOfMemoryError", "out of memory", "not enough memory", "can't allocate memory", "MemoryError"),
    "Cannot allocate memory",  # the system's, of a file that could not be mapped
)
_BY_CLASS: dict[type[Exception], ErrorKind] = {
    InvalidRequestError: "invalid_request",
    RequestAbortedError: "aborted",
    RequestTimeoutError: "timeout",
    QueueFullError: "queue_full",
}
# What requests are told that bring numbers which are not finite to a VAE (runtime/finite.py).
_THE_REQUESTS_OWN = ("are not finite",)


def kind_of(error: Exception) -> ErrorKind:
    """By class where it tells; else by what ranks said."""
    for cls, kind in _BY_CLASS.items():
        if isinstance(error, cls):
            return kind
    if type(error) is ValueError:  # how pipelines refuse what they are given; what a component raises is a CallError
        return "invalid_request"
    return kind_of_text(f"{type(error).__name__}: {error}")


def kind_of_text(text: str) -> ErrorKind:
    """Of an error that was told by a rank."""
    if any(word in text for word in _OUT_OF_MEMORY):
        return "out_of_memory"
    return "invalid_request" if any(word in text for word in _THE_REQUESTS_OWN) else "engine"


def refused(request: Request, error: Exception) -> OmniRequestOutput:
    """The output of a request that did not run, or not to its end."""
    return OmniRequestOutput(
        request_id=request.request_id, prompt=request.prompt, error=str(error), error_kind=kind_of(error)
    )
