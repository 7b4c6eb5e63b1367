"""Cosmos3: a call is one packed sequence of text and pictures, so it is one row, which nothing can be joined to."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="Cosmos3OmniPipeline",
        models=("Cosmos3",),
        kind="video",
        whole_calls=True,
        rows_in="vision_tokens",
    ),
)
