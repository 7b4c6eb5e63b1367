"""Adapters on the client's side: their names, their files, and requests made complete with them. No torch.

The ranks read an adapter when a request that names it is admitted; loading one by name beforehand saves that request
the time, and says at once whether it fits.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from denoised.errors import InvalidRequestError, one_line
from denoised.lora_request import Lora, LoRARequest, as_lora_requests, check_scale
from denoised.request import OmniDiffusionSamplingParams, Request

# What a folder's adapter is called, if it holds several files.
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
SUFFIX = ".safetensors"


class Names:
    """Adapters that were loaded under a name. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, LoRARequest] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Any:
        return iter(tuple(self._known))

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def add(self, lora: LoRARequest) -> None:
        with self._lock:
            self._known[lora.lora_name] = lora

    def remove(self, name: str) -> LoRARequest:
        """What was loaded under it. Raises InvalidRequestError."""
        with self._lock:
            if name not in self._known:
                raise self._unknown(name)
            return self._known.pop(name)

    def complete(self, request: Request) -> Request:
        """The request with its adapters' files.

        Raises:
            InvalidRequestError: an adapter that is not there.
        """
        params = request.params
        asked = as_lora_requests(params.lora_request)
        strength = 1.0 if params.lora_scale is None else params.lora_scale
        loras = tuple(self._found(one, strength) for one in asked)
        # The request may travel, be kept and be sent again: by then it says itself all that a name stood for.
        told = [lora.told() for lora in loras] or None
        params = dataclasses.replace(params, lora_request=told, lora_scale=None)
        return dataclasses.replace(request, params=params, loras=loras)

    def _found(self, asked: LoRARequest, strength: float) -> Lora:
        known = asked
        if not asked.lora_path:
            if asked.lora_name not in self._known:
                raise self._unknown(asked.lora_name)
            known = self._known[asked.lora_name]
        scale = asked.scale * strength * (known.scale if known is not asked else 1.0)
        check_scale(scale, "lora_scale")
        return resolve(dataclasses.replace(known, scale=scale, component=asked.component or known.component))

    def _unknown(self, name: str) -> InvalidRequestError:
        known = ", ".join(list(self._known)[:10]) or "none"
        return InvalidRequestError(
            f"lora_name={name!r:.80}: no adapter is loaded under it (loaded: {known}); load it, or give its lora_path."
        )


def resolve(lora: LoRARequest) -> Lora:
    """An adapter with its file, as it is now. Raises InvalidRequestError."""
    file = locate(lora.lora_path)
    state = file.stat()
    return Lora(
        name=lora.lora_name or lora.lora_path,
        path=str(file),
        stamp=(state.st_size, state.st_mtime_ns),
        scale=lora.scale,
        component=lora.component,
    )


def locate(path: str) -> Path:
    """The safetensors file of a path, a folder, or a hub id.

    Raises:
        InvalidRequestError: there is none, or several.
    """
    place = Path(os.path.expanduser(path))  # which, unlike Path's own, never raises
    if place.is_file():
        if place.suffix != SUFFIX:
            raise InvalidRequestError(
                f"lora_path={path!r:.200} is no {SUFFIX} file, and no others are read; convert it."
            )
        return place.absolute()
    if place.is_dir():
        return _in_folder(place)
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(SUFFIX):
        return _in_folder(_downloaded(path))
    raise InvalidRequestError(f"lora_path={path!r:.200} is no file, no folder and no hub id; give one that is there.")


def _in_folder(folder: Path) -> Path:
    files = sorted(file for file in folder.glob(f"*{SUFFIX}") if file.is_file())
    usual = [file for name in USUAL for file in files if file.name == name]
    if len(files) == 1 or usual:
        return (usual or files)[0].absolute()
    if not files:
        raise InvalidRequestError(
            f"lora_path={str(folder)!r:.200} holds no {SUFFIX} file, and no others are read; convert it."
        )
    few = ", ".join(file.name for file in files[:4])
    raise InvalidRequestError(f"lora_path={str(folder)!r:.200} holds several adapters ({few}); give one file of it.")


def _downloaded(name: str) -> Path:
    """A hub id through the usual cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{SUFFIX}", "adapter_config.json"]))
    except Exception as error:
        raise InvalidRequestError(
            f"lora_path={name!r:.200} is no file or folder, and cannot be had from the hub: {one_line(error):.200}."
        ) from error


def check_scale_has_adapter(params: OmniDiffusionSamplingParams, defaults: Mapping[str, Any]) -> None:
    """A strength of nothing is a slip. Raises InvalidRequestError."""
    if params.lora_scale is not None and not (params.lora_request or defaults.get("lora_request")):
        raise InvalidRequestError(
            f"lora_scale={params.lora_scale}: the request has no lora_request for it to act on; give one, or leave it "
            "out."
        )


def is_within(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a path lies in one of the folders, links followed."""
    try:
        real = os.path.realpath(path)
    except (ValueError, OSError):  # what no path may hold
        return False
    allowed = [os.path.realpath(os.path.expanduser(folder)) for folder in folders]
    return any(os.path.commonpath([real, folder]) == folder for folder in allowed)
