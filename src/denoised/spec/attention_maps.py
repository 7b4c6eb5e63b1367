"""Pipelines that look at attention maps, which processors of theirs keep on the modules, after each call."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = tuple(
    ModelSpec(pipeline=name, exclusive=True, defer=False, whole_calls=True, reads_modules=True)
    for name in ("StableDiffusionSAGPipeline", "StableDiffusionAttendAndExcitePipeline")
)
