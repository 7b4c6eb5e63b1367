"""Attention kernels by name: what each needs and takes, and how it is called.

Tensors are [batch, heads, tokens, channels]. Names are those of diffusers' `AttentionBackendName` without leading
underscores. Packages are imported when their kernel is chosen. Knows nothing of models or ranks, and sets no switch of
torch's, which would be the whole process's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoised.attention import kernels
from denoised.attention.flex import flex
from denoised.errors import InvalidRequestError
from denoised.steps.tally import count

HALF = (torch.float16, torch.bfloat16)

# From query, key, value, bias ([b or 1, h or 1, q or 1, k], added to scores; None), causal and scale: the answer.
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kernel.

    devices: kinds that it runs on. package: module and what to install, if it is not torch's own.
    dtypes: that it takes; (): any. step, largest: head channels are a multiple of `step` and at most `largest`.
    biased: device kinds on which it takes a mask. with_lse: for the ring, which merges by softmax's denominators.
    """

    name: str
    run: Run | None
    devices: tuple[str, ...] = ("cuda",)
    package: tuple[str, str] | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    step: int = 1
    largest: int | None = None
    biased: tuple[str, ...] = ()
    with_lse: kernels.Kernel | None = None

    @property
    def is_missing(self) -> bool:
        return self.package is not None and importlib.util.find_spec(self.package[0]) is None

    def fits(self, channels: int) -> bool:
        return channels % self.step == 0 and (self.largest is None or channels <= self.largest)

    def limits(self, device: str) -> tuple[tuple[torch.dtype, ...], int, int | None]:
        """Dtypes, step and largest number of head channels there: the kernels of CPUs take any."""
        return (self.dtypes, self.step, self.largest) if device == "cuda" else ((), 1, None)

    @property
    def ring_kernel(self) -> kernels.Kernel | None:
        """`with_lse`, counted."""
        return None if self.with_lse is None else functools.partial(self._merged, self.with_lse)

    def _merged(self, kernel: kernels.Kernel, *tensors: Any) -> tuple[Tensor, Tensor]:
        count(f"attention_{self.name}")
        return kernel(*tensors)

    def answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """In place of torch's attention; None: torch's own choice. Raises InvalidRequestError."""
        count(f"attention_{self.name}")
        if self.run is None or not query.numel():
            return None
        self._check(query, value, attn_mask)
        bias = None if attn_mask is None else kernels.additive(attn_mask, query.dtype)
        q, k, v = (_four(x) for x in (query, key, value))
        if k.shape[1] != q.shape[1]:  # key heads that several query heads share
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return self.run(q, k, v, bias, is_causal, scale).reshape(*query.shape[:-1], value.shape[-1])

    def _check(self, query: Tensor, value: Tensor, mask: Tensor | None) -> None:
        dtypes, _, _ = self.limits(query.device.type)
        problem = None
        if mask is not None and query.device.type not in self.biased:
            problem = "takes no mask, and this request's attention has one"
        elif dtypes and query.dtype not in dtypes:
            problem = f"takes no {query.dtype}".replace("torch.", "")
        elif query.device.type == "cuda" and not self.fits(query.shape[-1]):
            problem = f"takes no heads of {query.shape[-1]} channels"
        elif query.shape[-1] != value.shape[-1] and self.name != "native_math":
            problem = f"takes no values of {value.shape[-1]} channels beside queries of {query.shape[-1]}"
        if problem is not None:
            raise InvalidRequestError(f"attention_backend='{self.name}' {problem}; start with 'native'.")


def _four(x: Tensor) -> Tensor:
    """With batch and heads, of which some attentions leave out one."""
    return x.reshape(-1, *x.shape[-3:]) if x.dim() > 3 else x[(None,) * (4 - x.dim())]


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    return kernels.flash(q, k, v, bias, scale, causal=causal)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    return kernels.efficient(q, k, v, bias, scale, causal=causal)[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    q, k, v = (x.contiguous() for x in (q, k, v))
    result: Tensor = op(q, k, v, bias, False, 0.0, causal, False, scale=scale)[0]
    return result


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    op = torch.ops.aten._scaled_dot_product_attention_math
    result: Tensor = op(q, k, v, bias, 0.0, causal, None, scale=scale)[0]
    return result


def _tokens_first(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A kernel that has heads behind tokens."""
    out = call(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first.transpose(1, 2)


def _flash_attn(
    module: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    call = importlib.import_module(module).flash_attn_func
    return _tokens_first(call, q, k, v, softmax_scale=scale, causal=causal)


def _sage(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    call = importlib.import_module("sageattention").sageattn
    result: Tensor = call(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=scale)
    return result


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    mask = ops.LowerTriangularMask() if causal else None if bias is None else kernels.aligned(bias, q, k)
    return _tokens_first(ops.memory_efficient_attention, q, k, v, attn_bias=mask, scale=scale)


_BOTH = ("cpu", "cuda")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(name="native", run=None, devices=_BOTH, dtypes=(), biased=_BOTH, with_lse=kernels.automatic),
        Backend(
            name="native_flash",
            run=_flash,
            devices=_BOTH,
            step=kernels.FLASH_STEP,
            largest=kernels.FLASH_LARGEST,
            biased=("cpu",),
            with_lse=kernels.flash,
        ),
        Backend(name="native_efficient", run=_efficient, dtypes=(), step=4, biased=_BOTH, with_lse=kernels.efficient),
        Backend(name="native_cudnn", run=_cudnn, step=8, largest=128, biased=_BOTH),
        Backend(name="native_math", run=_math, devices=_BOTH, dtypes=(), biased=_BOTH, with_lse=kernels.explicit),
        Backend(name="flex", run=flex, devices=_BOTH, dtypes=(), biased=_BOTH),
        Backend(
            name="flash",
            run=functools.partial(_flash_attn, "flash_attn"),
            package=("flash_attn", "pip install flash-attn"),
            step=8,
            largest=256,
        ),
        Backend(
            name="flash_3",
            run=functools.partial(_flash_attn, "flash_attn_interface"),
            package=("flash_attn_interface", "build the hopper folder of github.com/Dao-AILab/flash-attention"),
            step=8,
            largest=256,
        ),
        Backend(name="sage", run=_sage, package=("sageattention", "pip install sageattention"), largest=128),
        Backend(
            name="xformers",
            run=_xformers,
            package=("xformers", "pip install xformers"),
            dtypes=(),
            step=8,
            biased=_BOTH,
        ),
    )
}

# Shorter names, and the one that tells the package's second generation from its third.
ALIASES = {
    "flash_2": "flash",
    "efficient": "native_efficient",
    "cudnn": "native_cudnn",
    "math": "native_math",
}


def find(name: str) -> Backend | None:
    """By name, by a shorter one, or by diffusers' own spelling."""
    plain = name.removeprefix("_")
    return BACKENDS.get(ALIASES.get(plain, plain))


def usable(device: str) -> tuple[str, ...]:
    """Names of what runs here: on this kind of device, with the packages that are installed."""
    return tuple(name for name, backend in BACKENDS.items() if device in backend.devices and not backend.is_missing)
