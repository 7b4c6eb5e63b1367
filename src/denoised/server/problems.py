"""What goes wrong, in HTTP's and OpenAI's words: a status, and {"error": {message, type, param, code}}.

`x-should-retry: false` tells the openai package not to send again what would fail again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from denoised.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    one_line,
)
from denoised.outputs import ErrorKind

# Nobody reads the answer to one who hung up; logs and metrics count it under this status.
CLIENT_GONE = 499
_NO_RETRY = {"x-should-retry": "false"}
_BY_KIND: dict[ErrorKind, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "aborted": (503, "aborted"),
    "timeout": (504, "timeout"),
    "queue_full": (429, "rate_limit_error"),
    "out_of_memory": (507, "out_of_memory"),
    "engine": (500, "server_error"),
}
_BY_STATUS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(HTTPException):
    """An answer that is an error. An HTTPException, so that no layer between takes it for a crash."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code
        self.type = type or _type_of(status)

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {k: _text(v) for k, v in error.items()}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, headers=dict(self.headers or {}))


def _type_of(status: int) -> str:
    return _BY_STATUS.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _text(value: str | None) -> str | None:
    """What can be written as UTF-8: a message may quote what a request holds."""
    return value if value is None else value.encode("utf-8", "replace").decode()


def invalid(message: str, param: str | None = None) -> Refusal:
    """A 400. Without `param`, the field that the message begins with."""
    return Refusal(400, message, param=param or _field_in(message), code="invalid_value")


_FIELD = re.compile(r"(?:multi_modal_data\.)?([a-z][a-z0-9_]*)(?:=|:| x | is | has | holds | and )")


def _field_in(message: str) -> str | None:
    found = _FIELD.match(message)
    return found[1] if found else "extra_args" if "in extra_args" in message else None


def of_error(error: Exception) -> Refusal:
    """What an exception of the engine's own vocabulary becomes."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InvalidRequestError):
        return invalid(str(error))
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return Refusal(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, RequestTimeoutError):
        return of_kind("timeout", str(error))
    if isinstance(error, RequestAbortedError):
        return of_kind("aborted", str(error))
    return of_kind("engine", one_line(error))


def of_kind(kind: ErrorKind | None, message: str) -> Refusal:
    """What the error of an output becomes."""
    status, type = _BY_KIND[kind or "engine"]
    if status == 400:
        return invalid(message)
    headers = {} if status in (429, 503) else _NO_RETRY
    return Refusal(status, message, type=type, code=kind or "engine", headers=headers)


def unavailable(reason: str, *, retry_after: int = 5) -> Refusal:
    return Refusal(503, reason, code="unavailable", headers={"Retry-After": str(retry_after)})
