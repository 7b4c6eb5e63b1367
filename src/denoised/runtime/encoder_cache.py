"""Encoding the same prompt or image twice is computed once: least recently used, by content, bounded in bytes.

Only calls without randomness are kept: an encoder's forward and a VAE's `encode` (which gives a distribution;
sampling from it is the pipeline's own). `generate` of a language model is not.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from denoised.steps.forward import Call, Stage

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size)


class _NoContentError(Exception):
    """An argument whose content cannot be read: the call is not cached."""


class EncoderCache:
    """Content key to output. Outputs are copied in and out, so that no request can change another's."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def key(self, call: Call) -> str | None:
        """The content of a call, or None if it must always run."""
        if call.target.stage is not Stage.ENCODE or call.target.method == "generate" or not self._max_bytes:
            return None
        if call.ambient.grad and not call.ambient.inference:  # an output with a history cannot be copied
            return None
        digest = hashlib.blake2b(f"{call.target.name}.{call.target.method}".encode(), digest_size=20)
        digest.update(repr((call.ambient, call.adapters)).encode())
        try:
            for part in _content(call.named_arguments()):
                digest.update(part)
        except _NoContentError:
            return None
        return digest.hexdigest()

    def get(self, key: str | None) -> Any | None:
        """A copy of the stored output, or None."""
        if key is None or key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return copy.deepcopy(self._entries[key][0])

    def put(self, key: str | None, value: Any) -> None:
        """Store a copy; drop the least recently used until the bound holds."""
        size = sum(t.numel() * t.element_size() for t in _tensors(value))
        if key is None or size > self._max_bytes:
            return
        self._entries[key] = (copy.deepcopy(value), size)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1][1]


def _content(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__}{len(value)}".encode()
        for item in value:
            yield from _content(item)
    elif isinstance(value, dict):
        yield f"{type(value).__name__}{len(value)}".encode()
        for name in sorted(value, key=str):
            yield str(name).encode()
            yield from _content(value[name])
    elif isinstance(value, _PLAIN):
        yield f"{type(value).__name__}:{value!r}".encode()
    else:
        raise _NoContentError


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors of an output: containers, model outputs, and plain objects such as latent distributions."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item, depth))
    elif isinstance(value, list | tuple):
        yield from (t for item in value for t in _tensors(item, depth))
    elif hasattr(value, "__dict__") and depth < 2:
        yield from (t for item in vars(value).values() for t in _tensors(item, depth + 1))
