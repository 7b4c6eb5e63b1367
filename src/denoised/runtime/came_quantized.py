"""What cannot be done to weights that come quantized, in the words of the engine and of the plan. No torch."""

from __future__ import annotations

from denoised.config import DiffusionParallelConfig


def cut_problem(name: str, parallel: DiffusionParallelConfig, *, is_denoiser: bool, is_encoder: bool) -> str | None:
    """Why ranks cannot share a component's weights, which are taken as they are, whole. None: they do not."""
    if not is_denoiser and not is_encoder:
        return None
    field = "tensor_parallel_size" if is_denoiser else "text_encoder_tp_size"
    if getattr(parallel, field) > 1:
        return (
            f"{field}={getattr(parallel, field)} would cut {name}, whose weights came quantized; leave it at 1, or "
            "take the model unquantized and set quantization, which quantizes what is cut."
        )
    if parallel.use_hsdp:
        return (
            f"use_hsdp=True shards plain weights only, and those of {name} came quantized; leave it off, or raise "
            "ulysses_degree or cfg_parallel_size."
        )
    return None


def again_problem(name: str, what: str) -> str:
    """Why they cannot be quantized again. what: is done to them, as "Int8Tensor in 48 layers"."""
    return f"quantization: {name} of this model is quantized already ({what}); leave {name} out."
