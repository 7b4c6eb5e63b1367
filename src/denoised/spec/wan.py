"""Wan 2.2: one or two experts, one call a guidance branch."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(pipeline="WanPipeline", models=("Wan2.2-T2V-A14B", "Wan2.2-TI2V-5B"), kind="video"),
    ModelSpec(pipeline="WanImageToVideoPipeline", models=("Wan2.2-I2V-A14B",), kind="video", needs_image=True),
)
