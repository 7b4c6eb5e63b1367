"""What is published of models for caches: for TeaCache the polynomials that foretell how much the output changes.

Valid for the very model that they were fitted to, which its configuration tells; others are calibrated
(`denoised calibrate`), and the result lies beside their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Published:
    """Settings of `backend` for denoisers of class `model` with this `config`, and where they are from."""

    model: str
    backend: str
    settings: dict[str, Any]
    source: str
    config: dict[str, Any] = field(default_factory=dict)


_TEACACHE = "github.com/ali-vilab/TeaCache"


def _tea_cache(
    model: str, config: dict[str, Any], coefficients: list[float], *, source: str = _TEACACHE, **more: Any
) -> Published:
    settings = {"coefficients": coefficients, **more}
    return Published(model=model, backend="tea_cache", config=config, settings=settings, source=source)


# Wan2.1 was fitted to the timestep's embedding, with five steps of warm-up ("ret_steps").
_WAN: dict[str, Any] = {"probe": "timestep", "max_warmup_steps": 5}

PUBLISHED: tuple[Published, ...] = (
    _tea_cache(
        "FluxTransformer2DModel",
        {"num_layers": 19, "num_single_layers": 38},
        [4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01],
    ),
    _tea_cache(
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 20, "num_single_layers": 40},
        [7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02],
    ),
    _tea_cache(
        "LTXVideoTransformer3DModel",
        {"num_layers": 28},
        [2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03],
    ),
    _tea_cache(
        "WanTransformer3DModel",
        {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16},
        [-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02],
        **_WAN,
    ),
    _tea_cache(
        "QwenImageTransformer2DModel",
        {"num_layers": 60, "num_attention_heads": 24},
        [-4.5e02, 2.8e02, -4.5e01, 3.2, -2.0e-02],
        source="github.com/vllm-project/vllm-omni, which has them from ComfyUI-TeaCache, tuned by hand",
    ),
)


def published(model: str, config: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """What is published for a denoiser of this class and configuration; empty if nothing is."""
    for entry in PUBLISHED:
        fits = all(config.get(name) == value for name, value in entry.config.items())
        if (entry.model, entry.backend) == (model, backend) and fits:
            return dict(entry.settings)
    return {}
