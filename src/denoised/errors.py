"""Errors that users meet. Each message is one sentence with the field, the value and the way out.

This file knows nothing of torch, HTTP or the command line; those map the classes to exit codes and statuses.
"""

from __future__ import annotations


class DenoisedError(Exception):
    """Base of all errors that this package raises on purpose."""


class InvalidConfigError(DenoisedError, ValueError):
    """The engine cannot start with these settings."""


class InvalidRequestError(DenoisedError, ValueError):
    """This request cannot be run; the engine and other requests are unharmed."""


class ModelError(DenoisedError):
    """The model folder is missing, incomplete or damaged."""


class EngineError(DenoisedError):
    """The engine failed; the request was not at fault."""


class RequestAbortedError(DenoisedError):
    """The request was cancelled before it finished."""


class QueueFullError(DenoisedError):
    """Too much is waiting already. `retry_after` is a guess, in seconds, of when it is worth asking again."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeoutError(DenoisedError):
    """The request was not done by its deadline; its work was stopped."""


def one_line(error: BaseException, limit: int = 400) -> str:
    """`error` as one line of at most `limit` characters, with its type where the message alone says too little."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, DenoisedError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
