"""HunyuanVideo 1.5: a guider object makes one call a branch."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(pipeline="HunyuanVideo15Pipeline", models=("HunyuanVideo-1.5-T2V",), kind="video"),
    ModelSpec(
        pipeline="HunyuanVideo15ImageToVideoPipeline",
        models=("HunyuanVideo-1.5-I2V",),
        kind="video",
        needs_image=True,
    ),
)
