"""Trees of plain values as JSON and a list of tensors, and back. Nothing is pickled, so nothing that is read can run.

Knows lists, tuples, dicts, numbers, strings, tensors, arrays, pictures, and the output classes of diffusers; whatever
else a tree holds makes it `UnpackableError`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from denoised import hf

Json = Any
_RAW_MODES = ("L", "RGB", "RGBA")


class UnpackableError(TypeError):
    """A value that has no form in which it could be kept."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A tree: its skeleton as JSON, with the numbers of its tensors in their places."""

    skeleton: Json
    tensors: list[torch.Tensor] = field(default_factory=list)

    def unpack(self, *, device: torch.device | None = None) -> Any:
        """The tree again. `device`: where tensors go that were not on the CPU.

        Raises:
            UnpackableError: a skeleton that `pack` did not make.
        """
        try:
            return _unpacked(self.skeleton, self.tensors, device)
        except (IndexError, KeyError, ValueError, OSError, AttributeError) as error:
            raise UnpackableError(f"no skeleton of a tree: {error}") from error


def pack(value: Any, *, copy: bool = True) -> Packed:
    """A tree as it is at this moment.

    Args:
        copy: tensors are copied, each to where it was; else they are the tree's own.

    Raises:
        UnpackableError: it holds something that has no such form.
    """
    tensors: list[torch.Tensor] = []
    skeleton = _packed(value, tensors)
    return Packed(skeleton=skeleton, tensors=[t.clone().contiguous() for t in tensors] if copy else tensors)


def same(a: Packed, b: Packed) -> bool:
    """Whether two trees are equal, tensors bit by bit."""
    pairs = zip(a.tensors, b.tensors, strict=False)
    alike = len(a.tensors) == len(b.tensors) and repr(a.skeleton) == repr(b.skeleton)
    return alike and all(x.dtype == y.dtype and x.device == y.device and torch.equal(x, y) for x, y in pairs)


def _packed(value: Any, tensors: list[torch.Tensor]) -> Json:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return ["tensor", _keep(value.detach(), tensors), value.device.type]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_packed(item, tensors) for item in value]]
    if isinstance(value, dict):
        items = [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]
        return ["dict", items] if type(value) is dict else ["output", _output_name(value), items]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = np.array(value, order="C")
        return [type(value).__name__ if isinstance(value, np.ndarray) else "number", _keep(_tensor(array), tensors)]
    if isinstance(value, Image.Image):
        raw = value.mode in _RAW_MODES
        number = _keep(_bytes(value.tobytes()) if raw else _png(value), tensors)
        return ["picture", number, [value.mode, *value.size] if raw else None]
    if isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    raise UnpackableError(f"a {type(value).__name__} cannot be kept")


def _keep(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> int:
    tensors.append(tensor)
    return len(tensors) - 1


def _tensor(array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UnpackableError(f"an array of {array.dtype} cannot be kept") from error


def _output_name(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if hf.output_class(name) is not type(value):
        raise UnpackableError(f"a {type(value).__name__} cannot be kept")
    return name


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _png(picture: Image.Image) -> torch.Tensor:
    """What loses nothing of the modes that it has, palettes among them."""
    picture, buffer = picture.copy(), io.BytesIO()
    picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}
    try:
        picture.save(buffer, format="PNG")
    except (OSError, ValueError) as error:
        raise UnpackableError(f"a picture of mode {picture.mode} cannot be kept") from error
    return _bytes(buffer.getvalue())


def _unpacked(node: Json, tensors: list[torch.Tensor], device: torch.device | None) -> Any:
    if not isinstance(node, list):
        return node
    kind, what = node[0], node[1]
    if kind == "tensor":
        tensor = tensors[what].clone()
        return tensor if node[2] == "cpu" or device is None else tensor.to(device)
    if kind in ("list", "tuple"):
        items = [_unpacked(item, tensors, device) for item in what]
        return items if kind == "list" else tuple(items)
    if kind in ("dict", "output"):
        pairs = node[2] if kind == "output" else what
        found = {_unpacked(k, tensors, device): _unpacked(v, tensors, device) for k, v in pairs}
        return found if kind == "dict" else _output(what, found)
    return _picture(tensors[what], node[2]) if kind == "picture" else _leaf(kind, what, tensors)


def _picture(raw: torch.Tensor, shape: list[Any] | None) -> Image.Image:
    data = raw.cpu().numpy().tobytes()
    if shape is not None:
        return Image.frombytes(shape[0], (shape[1], shape[2]), data)
    return Image.open(io.BytesIO(data), formats=["PNG"]).copy()


def _leaf(kind: str, what: Any, tensors: list[torch.Tensor]) -> Any:
    if kind in ("ndarray", "number"):
        array = tensors[what].clone().cpu().numpy()
        return array if kind == "ndarray" else array[()]
    if kind in ("dtype", "device"):
        return torch.device(what) if kind == "device" else _dtype(what)
    raise UnpackableError(f"{kind!r} is no kind of value")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise UnpackableError(f"{name!r} is no dtype")
    return found


def _output(name: str, items: dict[str, Any]) -> Any:
    found = hf.output_class(name)
    if found is None:
        raise UnpackableError(f"{name!r} is no output class of diffusers")
    return found(**items)
