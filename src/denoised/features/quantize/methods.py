"""The ways to quantize a matrix: torchao's, and the blocks of GGUF files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from denoised.errors import InvalidConfigError, one_line
from denoised.steps import parts

# Of the norm of a product of random matrices; what runs and is further off does not run.
TOLERANCE = 0.1
ELEMENTS = 2**19  # that are quantized at a time
GGUF = "gguf"


@dataclass(frozen=True, kw_only=True)
class Method:
    """quantize: from a matrix (out, in) to what stands for it as a layer's weight. None: it is so in its file.

    everywhere: also what `spec/quantization.py` would leave alone, for nothing is lost that the file still has.
    multiple: kernels take matrices whose sides divide by it; others stay as they are.
    dtypes: of the matrices that it takes; (): any.
    """

    name: str
    quantize: Callable[[Tensor], Tensor] | None
    everywhere: bool = False
    multiple: int = 1
    dtypes: tuple[torch.dtype, ...] = ()

    def fits(self, shape: torch.Size) -> bool:
        return all(side % self.multiple == 0 for side in shape)


def method(name: str, device: torch.device) -> Method:
    """A method by the name that settings have for it."""
    return _METHODS[name](device)


def _int8(device: torch.device) -> Method:
    """int8 activations, each row with a scale of its own, so that rows of others change nothing; products in int32."""
    quantize = _by_rows(functools.partial(_to_int8, device=device, active=True))
    return Method(name="int8", quantize=quantize, multiple=1 if device.type == "cpu" else 8)


def _int8_weight_only(device: torch.device) -> Method:
    return Method(name="int8_weight_only", quantize=_by_rows(functools.partial(_to_int8, device=device, active=False)))


def _fp8(device: torch.device) -> Method:
    if device.type == "cpu":
        return Method(name="fp8", quantize=_by_rows(_to_fp8))
    # With a scale a row, kernels of accelerators give no other dtype.
    return Method(name="fp8", quantize=_by_rows(_to_fp8), multiple=16, dtypes=(torch.bfloat16,))


def _gguf(device: torch.device) -> Method:
    """What is packed in the file stays packed; the rest is as it is there."""
    return Method(name=GGUF, quantize=None, everywhere=True)


_METHODS: dict[str, Callable[[torch.device], Method]] = {
    "fp8": _fp8,
    "int8": _int8,
    "int8_weight_only": _int8_weight_only,
    GGUF: _gguf,
}


def _by_rows(quantize: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Some rows after the others. Each has a scale of its own, and what the libraries make on the way is ten times as
    large as what they are given."""

    def quantized(matrix: Tensor) -> Tensor:
        rows = max(1, ELEMENTS // matrix.shape[1])
        pieces = torch.split(matrix, rows)
        return parts.joined([quantize(some) for some in pieces])

    return quantized


def _to_int8(matrix: Tensor, *, device: torch.device, active: bool) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    from torchao.utils import should_reduce_range

    narrow = active and should_reduce_range(device)
    rows = QuantizeTensorToInt8Kwargs(granularity=PerRow(), reduce_range=narrow) if active else None
    found: Tensor = Int8Tensor.from_hp(matrix, granularity=PerRow(), act_quant_kwargs=rows, reduce_range=narrow)
    return found


def _to_fp8(matrix: Tensor) -> Tensor:
    """By torchao's tensor and not by its configuration, which asks for a GPU before it tries."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    found: Tensor = Float8Tensor.from_hp(
        matrix,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow()),
    )
    return found


def check_dtype(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Whether the method takes such weights on such a device, which need not be here. Raises InvalidConfigError."""
    allowed = method(name, device).dtypes
    if allowed and dtype not in allowed:
        names = " or ".join(_short(one) for one in allowed)
        raise InvalidConfigError(
            f"quantization={name!r} takes weights in {names} on this device, and these are {_short(dtype)}; "
            f"use dtype={_short(allowed[0])!r}, or quantization='int8'."
        )


@functools.cache
def check_runs(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try the very product that layers will ask for, on this device.

    Raises:
        InvalidConfigError: it does not run here, with torch's reason and what would.
    """
    check_dtype(name, device, dtype)
    found = method(name, device)
    if found.quantize is None:
        return
    problem = _problem(found, device, dtype)
    if problem is not None:
        ways = [other for other in _METHODS if other in ("int8", "int8_weight_only") and other != name]
        ways = [other for other in ways if _problem(method(other, device), device, dtype) is None]
        raise InvalidConfigError(
            f"quantization={name!r} does not run on {_title(device)} ({problem}); use "
            f"{' or '.join(map(repr, ways)) or repr(GGUF)}, or leave it out."
        )


def _problem(found: Method, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a product of these is not to be had, or is wrong."""
    assert found.quantize is not None
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 64, generator=draw).to(device, dtype)
    x = torch.randn(32, 64, generator=draw).to(device, dtype)
    try:
        with torch.no_grad():
            expected, y = F.linear(x, matrix).float(), F.linear(x, found.quantize(matrix)).float()
    except Exception as error:  # whatever kernels raise that a device does not have
        return one_line(error, limit=160).rstrip(".")
    off = float((y - expected).norm() / expected.norm())
    return None if off <= TOLERANCE else f"its product is off by {off:.0%}"


def _title(device: torch.device) -> str:
    if device.type != "cuda":
        return f"this {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, of compute capability {major}.{minor}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
