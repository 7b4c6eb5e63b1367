"""Helios: frame numbers of the chunk and of its memory have one row, whatever the batch."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

_FRAMES = frozenset(
    {
        "indices_hidden_states",
        "indices_latents_history_short",
        "indices_latents_history_mid",
        "indices_latents_history_long",
    }
)

SPECS = (
    ModelSpec(pipeline="HeliosPipeline", models=("Helios",), kind="video", chunked=True, shared=_FRAMES),
    ModelSpec(
        pipeline="HeliosPyramidPipeline",
        models=("Helios-Pyramid",),
        kind="video",
        chunked=True,
        shared=_FRAMES,
        packing=8,  # the first of three sizes has a quarter of the latents along each side, and tokens of two
    ),
)
