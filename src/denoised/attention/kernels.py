"""Attention of one block of keys, with the logarithm of its softmax's denominator, so that blocks can be merged.

Tensors are [batch, heads, tokens, channels]. Knows kernels and devices, and nothing of ranks.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# The memory-efficient kernel reads its bias in rows of 16 bytes: of 8 half-precision numbers.
BIAS_ALIGNMENT = 8
# Head channels that the flash kernel takes.
FLASH_STEP, FLASH_LARGEST = 8, 256


@dataclass(frozen=True, kw_only=True)
class Part:
    """The answer over some of the keys. out: fp32, [b, h, q, d]; lse: fp32, [b, h, q], -inf where no key was seen."""

    out: Tensor
    lse: Tensor


# From query, key, value, bias and scale: the answer, and the logarithm of its softmax's denominator.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], tuple[Tensor, Tensor]]
_chosen = threading.local()


@contextlib.contextmanager
def chosen(kernel: Kernel | None) -> Iterator[None]:
    """Within it, this thread's `attend` uses that kernel; None: the one that fits best."""
    before = getattr(_chosen, "kernel", None)
    _chosen.kernel = kernel
    try:
        yield
    finally:
        _chosen.kernel = before


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None) -> Part:
    """One block. `mask`: True or 0 for what may be seen, broadcast to [b, h, q, k]."""
    if not key.shape[2] or not query.numel():  # the kernels divide by the number of keys
        return _nothing(query, value)
    bias = None if mask is None else additive(mask, query.dtype)
    kernel: Kernel = getattr(_chosen, "kernel", None) or automatic
    out, lse = kernel(query, key, value, bias, scale)
    lse = lse.float()
    if bias is not None:
        blind = torch.isneginf(bias).all(-1)  # kernels disagree on what such a row's denominator is
        lse = lse.masked_fill(blind.expand_as(lse), -math.inf)
        out = out.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)
    return Part(out=out.float(), lse=lse)


def merge(a: Part, b: Part) -> Part:
    """The answer over the keys of both."""
    # The weight of b is exp(b) / (exp(a) + exp(b)); -inf minus -inf is no number, and both answers are 0 there.
    share = torch.sigmoid(torch.nan_to_num(b.lse - a.lse, nan=0.0)).unsqueeze(-1)
    return Part(out=torch.lerp(a.out, b.out, share), lse=torch.logaddexp(a.lse, b.lse))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a bias in four dimensions: 0 for what may be seen, -inf for what may not."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def _nothing(query: Tensor, value: Tensor) -> Part:
    shape = query.shape[:-1]
    out = torch.zeros((*shape, value.shape[-1]), dtype=torch.float32, device=query.device)
    return Part(out=out, lse=torch.full(shape, -math.inf, dtype=torch.float32, device=query.device))


def automatic(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The kernel that fits the device and the tensors best."""
    same_channels = query.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and same_channels:
        return flash(query, key, value, bias, scale)
    if query.device.type == "cuda" and same_channels and _fits_flash(query):
        return flash(query, key, value, bias, scale) if bias is None else efficient(query, key, value, bias, scale)
    return explicit(query, key, value, bias, scale)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Torch's flash kernel. On CUDA it takes no bias."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, lse
    assert bias is None, "the flash kernel of CUDA takes no bias"
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1]


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Torch's memory-efficient kernel, of CUDA only."""
    full = None if bias is None else aligned(bias, query, key)
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, full, True, 0.0, causal, scale=scale
    )
    return found[0], found[1][..., : query.shape[2]]


def _fits_flash(query: Tensor) -> bool:
    channels = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and channels % FLASH_STEP == 0 and channels <= FLASH_LARGEST


def aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias for the memory-efficient kernel: of full shape (by strides of 0), its rows at aligned addresses."""
    missing = -key.shape[2] % BIAS_ALIGNMENT
    rows = bias.expand(*bias.shape[:3], key.shape[2])
    padded = torch.nn.functional.pad(rows, (0, missing))[..., : key.shape[2]]
    return padded.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def explicit(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The formula itself, in fp32, where no kernel gives the denominator."""
    scores = query.float() @ key.float().transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias.float()
    lse = torch.logsumexp(scores, dim=-1)
    seen = torch.where(torch.isneginf(lse), 0.0, lse)
    return torch.exp(scores - seen.unsqueeze(-1)) @ value.float(), lse
