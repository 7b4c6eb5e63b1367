"""Stable-Audio-Open: both guidance branches in one batch; rotary embeddings have no batch dimension."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="StableAudioPipeline",
        models=("Stable-Audio-Open",),
        kind="audio",
        shared=frozenset({"rotary_embedding"}),
    ),
)
