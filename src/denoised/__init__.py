"""denoised: an inference engine for diffusion models.

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from denoised.config import DiffusionParallelConfig
    from denoised.lora_request import LoRARequest
    from denoised.models.cfg_parallel import CFGParallelMixin
    from denoised.outputs import OmniRequestOutput
    from denoised.request import OmniDiffusionSamplingParams
    from denoised.runtime.omni import AsyncOmni, Omni

__version__ = "0.1.0"

_HOMES = {
    "AsyncOmni": "denoised.runtime.omni",
    "CFGParallelMixin": "denoised.models.cfg_parallel",
    "DiffusionParallelConfig": "denoised.config",
    "LoRARequest": "denoised.lora_request",
    "Omni": "denoised.runtime.omni",
    "OmniDiffusionSamplingParams": "denoised.request",
    "OmniRequestOutput": "denoised.outputs",
}

__all__ = [
    "AsyncOmni",
    "CFGParallelMixin",
    "DiffusionParallelConfig",
    "LoRARequest",
    "Omni",
    "OmniDiffusionSamplingParams",
    "OmniRequestOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'denoised' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
