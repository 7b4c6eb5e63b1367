"""Catching a model's attention without changing the model.

The library's attention processors end in torch's own function, whether they go through its dispatch or call it
themselves. A mode of torch catches that call on this thread, inside the block, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PLAIN = torch.nn.functional.scaled_dot_product_attention


class Attention(TorchFunctionMode):
    """Within it, `answer(query, key, value, **options)` is asked first; None leaves the call to torch.

    The mode is off while `answer` runs, so it may use torch's attention itself.
    """

    def __init__(self, answer: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _PLAIN:
            answer = self._answer(*args, **kwargs)
            if answer is not None:
                return answer
        return func(*args, **kwargs)
