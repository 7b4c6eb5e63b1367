"""Ovis-Image: position ids have no batch dimension, as in FLUX.1."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="OvisImagePipeline", packing=2, models=("Ovis-Image",), shared=frozenset({"img_ids", "txt_ids"})
    ),
)
