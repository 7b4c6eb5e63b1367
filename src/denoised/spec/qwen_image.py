"""Qwen-Image: one transformer, five variants. Image shapes are read from their first entry, so they are shared."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

_SHARED = frozenset({"img_shapes"})
_TEXT = {"encoder_hidden_states": "encoder_hidden_states_mask"}

SPECS = (
    ModelSpec(pipeline="QwenImagePipeline", models=("Qwen-Image", "Qwen-Image-2512"), shared=_SHARED, padded=_TEXT),
    ModelSpec(
        pipeline="QwenImageEditPipeline", models=("Qwen-Image-Edit",), shared=_SHARED, padded=_TEXT, needs_image=True
    ),
    ModelSpec(
        pipeline="QwenImageEditPlusPipeline",
        models=("Qwen-Image-Edit-2509",),
        shared=_SHARED,
        padded=_TEXT,
        needs_image=True,
    ),
    ModelSpec(
        pipeline="QwenImageLayeredPipeline",
        models=("Qwen-Image-Layered",),
        shared=_SHARED,
        padded=_TEXT,
        needs_image=True,
    ),
)
