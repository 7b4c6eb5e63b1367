"""An adapter's file as it is: tensors by name, and what was written beside them. Safetensors only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from denoised.errors import InvalidRequestError, one_line

CONFIG = "adapter_config.json"  # PEFT's, beside its adapter_model.safetensors
_PEFT_FILE = "adapter_model.safetensors"
_HEADER = "lora_adapter_metadata"  # diffusers', in the file's header, as JSON
_CHUNK = 2**22


@dataclass(frozen=True, kw_only=True)
class Raw:
    """tensors: by the names in the file. settings: PEFT's of a LoRA, keys with or without a component before them.
    digest: of all of it. num_bytes: of the file."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    digest: str
    num_bytes: int


def read(path: str, *, title: str) -> Raw:
    """A file, whole, in CPU memory. `title`: what errors call it.

    Raises:
        InvalidRequestError: it is not there, or is no safetensors file.
    """
    file = Path(path)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = dict(opened.metadata() or {})
        settings, found, size = _settings(file, header), _digest(file), file.stat().st_size
    except Exception as error:  # whatever bytes can do to parsers
        raise InvalidRequestError(f"{title} cannot be read: {one_line(error)}; give a safetensors file.") from error
    return Raw(tensors=tensors, settings=settings, digest=found, num_bytes=size)


def _settings(file: Path, header: dict[str, str]) -> dict[str, Any]:
    beside = file.parent / CONFIG
    text = beside.read_text() if file.name == _PEFT_FILE and beside.is_file() else header.get(_HEADER, "{}")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its settings are no JSON object")
    return found


def _digest(file: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in (file, file.parent / CONFIG) if file.name == _PEFT_FILE else (file,):
        if part.is_file():
            with part.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    found.update(chunk)
    return found.hexdigest()
