"""What was asked of the engine as JSON, to ask it again after a restart. Pictures are PNG; nothing is pickled."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import secrets
from typing import Any

from PIL import Image

from denoised.request import OmniDiffusionSamplingParams, Service
from denoised.server.asks import Ask

_PICTURE = "$png"


def pack(ask: Ask) -> dict[str, Any]:
    """An ask as JSON.

    Raises:
        TypeError: it holds what no HTTP request can bring.
    """
    return {
        "request_id": ask.request_id,
        "prompt": _packed(ask.prompt),
        "params": _packed(_given(ask.params)),
        "service": dataclasses.asdict(ask.service),
    }


def unpack(packed: dict[str, Any]) -> Ask:
    """The inverse of `pack`."""
    return Ask(
        request_id=packed["request_id"],
        prompt=_unpacked(packed["prompt"]),
        params=OmniDiffusionSamplingParams(**_unpacked(packed["params"])),
        service=Service(**packed["service"]),
    )


def digest(ask: Ask) -> str:
    """Equal for equal requests, whatever they are called."""
    packed = {key: value for key, value in pack(ask).items() if key != "request_id"}
    return hashlib.sha256(json.dumps(packed, sort_keys=True).encode()).hexdigest()


def lasting(ask: Ask, *, checkpoint_every: int) -> Ask:
    """The same, so that it gives the same whenever it is run: with a seed, and with checkpoints on its way."""
    given = _given(ask.params)
    if ask.params.seed is None and ask.params.generator is None:
        given["seed"] = secrets.randbits(31)
    service = dataclasses.replace(ask.service, checkpoint_every=checkpoint_every)
    return dataclasses.replace(ask, params=OmniDiffusionSamplingParams(**given), service=service)


def _given(params: OmniDiffusionSamplingParams) -> dict[str, Any]:
    """What the request itself says: a default that was given is its word, too."""
    fields = [f.name for f in dataclasses.fields(params)]
    unset = OmniDiffusionSamplingParams()
    return {n: v for n in fields if (v := getattr(params, n)) != getattr(unset, n) or n in params._given}


def _packed(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_packed(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _packed(item) for key, item in value.items()}
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG", compress_level=1)
        return {_PICTURE: base64.b64encode(buffer.getvalue()).decode()}
    raise TypeError(f"a {type(value).__name__} cannot be kept for a restart")


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_PICTURE}:
            return Image.open(io.BytesIO(base64.b64decode(value[_PICTURE])), formats=["PNG"]).copy()
        return {key: _unpacked(item) for key, item in value.items()}
    return value
