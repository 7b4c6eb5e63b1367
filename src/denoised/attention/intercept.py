"""Catching a model's attention without changing the model.

The library's attention processors end in torch's own function, whether they go through its dispatch or call it
themselves. A mode of torch catches that call on this thread, inside the block, and nowhere else.

A compiled graph cannot be traced through a mode. Whoever runs one leaves the modes (`paused`) and has the graph call
`denoised::attention` in place of torch's function, which asks the same answers at run time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PLAIN = torch.nn.functional.scaled_dot_product_attention
_local = threading.local()


class Attention(TorchFunctionMode):
    """Within it, `answer(query, key, value, **options)` is asked first; None leaves the call to torch.

    The mode is off while `answer` runs, so it may use torch's attention itself; modes further out then see that.
    """

    def __init__(self, answer: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self.answer = answer

    def __enter__(self) -> Attention:
        _local.modes = (*open_modes(), self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _local.modes = open_modes()[:-1]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _PLAIN:
            answer = self.answer(*args, **kwargs)
            if answer is not None:
                return answer
        return func(*args, **kwargs)


def open_modes() -> tuple[Attention, ...]:
    """Those that this thread is within, outermost first."""
    modes: tuple[Attention, ...] = getattr(_local, "modes", ())
    return modes


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Outside of all modes, which `denoised::attention` still asks."""
    modes, outer = open_modes(), getattr(_local, "asked", ())
    for mode in reversed(modes):
        mode.__exit__(None, None, None)
    _local.asked = modes
    try:
        yield
    finally:
        _local.asked = outer
        for mode in modes:
            mode.__enter__()


def asked() -> tuple[Attention, ...]:
    """The modes that are paused on this thread."""
    modes: tuple[Attention, ...] = getattr(_local, "asked", ())
    return modes


def _ask(modes: Sequence[Attention], *args: Any, **options: Any) -> Tensor:
    """The innermost mode first, as torch does it."""
    for index in reversed(range(len(modes))):
        with contextlib.ExitStack() as outer:
            for mode in modes[:index]:
                outer.enter_context(mode)
            answer = modes[index].answer(*args, **options)
        if answer is not None:
            return answer
    result: Tensor = _PLAIN(*args, **options)
    return result


@torch.library.custom_op("denoised::attention", mutates_args=())
def graph_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """What stands in a compiled graph where the model calls torch's attention."""
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": gqa}
    out = _ask(asked(), query, key, value, **options)
    return out.clone(memory_format=torch.contiguous_format)  # a graph's operators give memory of their own


@graph_attention.register_fake
def _shape(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
