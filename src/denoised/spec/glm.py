"""GLM-Image: two calls a step, after a language model has written the coarse tokens."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="GlmImagePipeline",
        models=("GLM-Image",),
        stores=frozenset({"kv_caches"}),
        packing=4,  # a coarse token is two of the transformer's along each side
    ),
)
