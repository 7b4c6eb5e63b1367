"""Bodies as their class says, from JSON or from forms, where numbers are text and lists repeat a name.

FastAPI would read JSON by itself; forms with open-ended fields it would not, and both shall answer errors alike.
"""

from __future__ import annotations

import json
import re
import typing
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from denoised.server import complaints
from denoised.server.problems import Refusal, invalid

B = TypeVar("B", bound=BaseModel)
MAX_UPLOADS, MAX_FIELDS, MAX_FIELD = 16, 200, 2**20
_NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")
Uploads = dict[str, list[bytes]]


async def read(request: Request, cls: type[B], uploads: tuple[str, ...] = ()) -> tuple[B, Uploads]:
    """The body as a `cls`, and the files of the fields that `uploads` names.

    Raises:
        Refusal: 400 with the field, or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return check(cls, _json(await request.body())), {}
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded") and uploads:
        async with request.form(max_files=MAX_UPLOADS, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD) as form:
            return await _of_form(form, cls, uploads)
    allowed = "application/json or multipart/form-data" if uploads else "application/json"
    raise Refusal(415, f"content-type={kind!r:.60}: must be {allowed}.", code="unsupported_media_type")


def check(cls: type[B], body: Any) -> B:
    """`body` as a `cls`.

    Raises:
        Refusal: 400, with the first thing that is wrong with it.
    """
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        raise complaints.refusal(error.errors(include_url=False), cls.model_fields) from error


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is no JSON ({str(error):.80}); send a JSON object.") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


async def _of_form(form: FormData, cls: type[B], uploads: tuple[str, ...]) -> tuple[B, Uploads]:
    body: dict[str, Any] = {}
    files: Uploads = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile):
            if name not in uploads:
                raise invalid(f"{name:.40} is no upload; give text, or use {' or '.join(uploads)}.", param=name)
            files.setdefault(name, []).append(await value.read())
        else:
            _put(body, name, value, cls)
    return check(cls, body), files


def _put(body: dict[str, Any], name: str, text: str, cls: type[BaseModel]) -> None:
    """One text field. `a[b]` is an entry of the object `a`; a field that is a list may come several times."""
    nested = _NESTED.fullmatch(name)
    outer, inner = (nested[1], nested[2]) if nested else (name, None)
    kinds = _kinds(cls, outer)
    value = text if str in kinds else _guess(text)
    if inner is not None:
        place, key = body.setdefault(outer, {}), inner
    else:
        place, key = body, name
    if inner is None and list in kinds and not isinstance(value, list):
        body.setdefault(name, []).append(value)
    elif not isinstance(place, dict) or key in place:
        raise invalid(f"{name:.40} is given twice; give it once.", param=outer)
    else:
        place[key] = value


def _guess(value: str) -> Any:
    """A number, true, false, null, a list or an object, if that is what the text says."""
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return value


def _kinds(cls: type[BaseModel], name: str) -> set[type]:
    field = cls.model_fields.get(name)
    return set() if field is None else _outer(field.annotation)


def _outer(hint: Any) -> set[type]:
    """The kinds of value that an annotation admits. A list of strings counts as both: its text is not looked into."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {type(choice) for choice in parts}
    if origin in (list, dict):
        return {origin} | ({str} if str in parts[:1] and origin is list else set())
    if parts:
        return {kind for part in parts for kind in _outer(part)}
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return {str}  # an object of strings
    return {hint} if isinstance(hint, type) else set()
