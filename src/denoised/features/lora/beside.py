"""The two small matrices beside a layer, this rank's part of them, and the forward that adds their product."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from denoised.spec.tensor import Shard
from denoised.steps.forward import running
from denoised.steps.tally import count

_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """down: (rank, in, *kernel). up: (out, rank, *ones). bias: (out,). scale: alpha / rank."""

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.bias) if t is not None)


def local(factors: Factors, layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Factors:
    """This rank's part, which follows from how the layer was cut."""
    shard: Shard | None = getattr(layer, "denoised_shard", None)
    down, up, bias = factors.down, factors.up, factors.bias
    if shard is not None and shard.dim == 0:
        up, bias = shard.take(up, 0), None if bias is None else shard.take(bias, 0)
    elif shard is not None:  # outputs are summed over ranks: what is added counts once
        down, bias = shard.take(down, 1), bias if shard.rank == 0 else None
    return Factors(
        down=down.to(device, dtype).contiguous(),
        up=up.to(device, dtype).contiguous(),
        bias=None if bias is None else bias.to(device, dtype),
        scale=factors.scale,
    )


class Beside:
    """Stands in for a layer's forward: the layer's own, plus what the adapters of the running forward add.

    It is put there before what must act on the sum (gathers, cuts of a sequence) and before anything is loaded, so
    that these stay outside. Without adapters it costs a look into a dict. `weights` are by adapter; `ran`: those that
    have acted here since they are in memory.
    """

    # Without adapters it does nothing, so that whoever runs a layer without any may leave it out meanwhile.
    steps_aside = True

    def __init__(self, layer: nn.Module) -> None:
        functools.update_wrapper(self, layer.forward)  # who asks sees the layer's own signature
        self.forward = layer.forward
        self.weights: dict[str, Factors] = {}
        self.ran: set[str] = set()
        numbers = vars(layer)
        self.stride, self.padding = numbers.get("stride", 1), numbers.get("padding", 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.forward(*args, **kwargs)
        if not self.weights:
            return y
        calls, x = running(), args[0] if args else kwargs["input"]  # the name that torch gives it
        for adapter in calls[0].adapters if calls else ():
            factors = self.weights.get(adapter.key)
            if factors is not None:
                count("lora_layers")
                self.ran.add(adapter.key)
                y = y + (self._product(x, factors) * (adapter.scale * factors.scale)).to(y.dtype)
        return y

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        x = x.to(factors.down.dtype)
        if factors.down.ndim == 2:
            return F.linear(F.linear(x, factors.down), factors.up, factors.bias)
        convolve = _CONVOLUTIONS[factors.down.ndim]
        return convolve(convolve(x, factors.down, None, self.stride, self.padding), factors.up, factors.bias)

    def forget(self, key: str) -> None:
        """An adapter leaves memory."""
        self.weights.pop(key, None)
        self.ran.discard(key)


def install(layer: nn.Module) -> Beside:
    """The stand-in, in place."""
    found = vars(layer).get("forward")
    if not isinstance(found, Beside):
        found = Beside(layer)
        layer.__dict__["forward"] = found
    return found


def is_reached(layer: nn.Module, beside: Beside) -> bool:
    """Whether the layer's forward still goes by the stand-in: one that replaces it must call what it found."""
    found = vars(layer).get("forward")
    while found is not None and found is not beside:
        found = getattr(found, "__wrapped__", None)
    return found is beside
