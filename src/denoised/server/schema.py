"""What /openapi.json says of bodies and errors, which routes read and raise by themselves."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from denoised.server.replies import ErrorReply

_REFS = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "Not as it should be: 400, 401, 404, 408, 413, 415; 429: queue full"},
    "5XX": {"model": ErrorReply, "description": "500 engine; 503 not ready; 504 timeout; 507 out of memory"},
}


def body(cls: type[BaseModel], *, uploads: tuple[str, ...] = (), json: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a `cls`: as JSON, and with uploads as a form."""
    content: dict[str, Any] = {"application/json": {"schema": _own(cls)}} if json else {}
    if uploads:
        content["multipart/form-data"] = {"schema": _with_uploads(cls, uploads)}
    return {"requestBody": {"required": True, "content": content}}


def _own(cls: type[BaseModel]) -> dict[str, Any]:
    made = cls.model_json_schema(ref_template=_REFS)
    made.pop("$defs", None)
    return made


def _with_uploads(cls: type[BaseModel], uploads: tuple[str, ...]) -> dict[str, Any]:
    """`image` may come several times, the others once."""
    made = copy.deepcopy(_own(cls))
    file = {"type": "string", "format": "binary"}
    for name in uploads:
        made["properties"][name] = {"type": "array", "items": file, "maxItems": 16} if name == "image" else file
    return made


def openapi(app: FastAPI, classes: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """The document: FastAPI's, and the parts that bodies of `classes` refer to."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for cls in classes:
        schemas |= cls.model_json_schema(ref_template=_REFS).get("$defs", {})
    return made
