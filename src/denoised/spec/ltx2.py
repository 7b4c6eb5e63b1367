"""LTX-2: a call with two rows, and one call each with blocks skipped and with the modalities apart."""

from __future__ import annotations

from denoised.spec.model_spec import Branch, ModelSpec

SPECS = (
    ModelSpec(
        pipeline="LTX2Pipeline",
        models=("LTX-2", "LTX-2.3"),
        kind="video",
        branches=(
            Branch(parameters=("stg_scale", "audio_stg_scale"), above=0.0),
            Branch(parameters=("modality_scale", "audio_modality_scale"), above=1.0),
        ),
        shared=frozenset({"spatio_temporal_guidance_blocks"}),  # numbers of blocks, not rows
    ),
)
