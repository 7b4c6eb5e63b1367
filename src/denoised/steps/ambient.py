"""Thread-local torch state of a program: gradients, inference mode, autocast. What is computed later runs under it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch


@cache
def _devices() -> tuple[str, ...]:
    """Kinds of devices that may autocast here. Asked once: the answer stays, and asking CUDA takes time."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True, kw_only=True)
class Ambient:
    """The state of one thread at one moment."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls) -> Ambient:
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _devices()),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run a block of another thread, or of another moment, as this one would have run it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield
