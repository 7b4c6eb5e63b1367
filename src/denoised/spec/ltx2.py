"""LTX-2: a call with two rows, and one call each with blocks skipped and with the modalities apart."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="LTX2Pipeline",
        models=("LTX-2", "LTX-2.3"),
        kind="video",
        shared=frozenset({"spatio_temporal_guidance_blocks"}),  # numbers of blocks, not rows
    ),
)
