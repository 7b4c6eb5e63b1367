"""What a denoiser call of a real pipeline does, counted while it runs."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

import tests.contract.rank_setup  # noqa: F401
from denoised.spec.blocks import stacks
from denoised.spec.registry import resolve
from tests.tiny import ROWS, checkpoint, small_images


@dataclass(frozen=True)
class Counted:
    """Of one call: operations a row, in all and inside the blocks; lengths that layers saw, 0 where it has none."""

    flops: float
    blocks: float
    image: int
    text: int


class _StopError(Exception):
    pass


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Operations of the CPU's fused attention, which torch does not count; shapes come in."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[-1])


_FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def counted(name: str, root: Path) -> Counted:
    """Run a row's pipeline up to its first denoiser call, and that with a counter."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint(name, root))
    pipeline.set_progress_bar_config(disable=True)
    spec = resolve(pipeline)
    model = getattr(pipeline, spec.denoisers[0])
    seen: dict[str, Any] = {}
    plain, signature = model.forward, inspect.signature(model.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        seen.update(rows=_num_rows(next(iter(given.values()))), text=_text_length(given))
        with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
            _add_blocks(model, spec, counter, seen)
            plain(*args, **kwargs)
        seen["flops"] = counter.get_total_flops()
        raise _StopError

    forward.__signature__ = signature  # type: ignore[attr-defined]
    model.forward = forward
    _note_lengths(model, spec, seen)
    with small_images(), pytest.raises(_StopError):
        pipeline(**ROWS[name].request(0))
    rows = seen["rows"]
    image, text = seen.get("image", 0) // rows, seen.get("read", seen["text"] * rows) // rows
    if image and "read" not in seen:
        image -= text  # one sequence of both, which no layer reads apart
    return Counted(flops=seen["flops"] / rows, blocks=seen["blocks"] / rows, image=image, text=text)


def _num_rows(latents: Any) -> int:
    """A call is a batch, or a list of rows, or one packed sequence of ids."""
    return 1 if isinstance(latents, torch.Tensor) and latents.ndim == 1 else len(latents)


def _text_length(given: dict[str, Any]) -> int:
    """The prompt's length as the denoiser's arguments have it, where no layer tells."""
    text = next((given[name] for name in ("encoder_hidden_states", "text_bth", "text_indexes") if name in given), None)
    return 0 if text is None else text.shape[-2 if text.ndim > 1 else 0]


def _add_blocks(model: Any, spec: Any, counter: FlopCounterMode, seen: dict[str, Any]) -> None:
    """Operations inside blocks, apart."""
    seen["blocks"] = 0

    def before(*_: Any) -> None:
        seen["before"] = counter.get_total_flops()

    def after(*_: Any) -> None:
        seen["blocks"] += counter.get_total_flops() - seen["before"]

    for block in (block for stack in stacks(model, spec.stacks) for block in stack.blocks):
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)


def _note_lengths(model: Any, spec: Any, seen: dict[str, Any]) -> None:
    """How many tokens the first block's first attention reads, and how many of the text its layers or a refiner's."""
    found = stacks(model, spec.stacks)
    layers = [item for stack in found for block in stack.blocks[:1] for item in _named(stack.path, block)]
    kinds = (_TEXT, _IMAGE) if any("_gen" in path for path, _ in layers) else (_IMAGE, _TEXT)
    for name, kind in zip(("image", "read"), kinds, strict=True):
        layer = next((layer for path, layer in layers if path.endswith(kind)), None)
        if layer is not None:
            layer.register_forward_pre_hook(_Note(name, seen))


_IMAGE, _TEXT = ("to_q",), ("add_k_proj", "to_k_t", ".attn2.to_k", "context_refiner.attention.to_k")


def _named(path: str, block: Any) -> list[tuple[str, Any]]:
    return [(f"{path}.{name}", layer) for name, layer in block.named_modules()]


class _Note:
    """A hook that notes how many vectors a layer reads, the first time."""

    def __init__(self, name: str, seen: dict[str, Any]) -> None:
        self._name, self._seen = name, seen

    def __call__(self, _: Any, inputs: tuple[Any, ...]) -> None:
        self._seen.setdefault(self._name, math.prod(inputs[0].shape[:-1]))
