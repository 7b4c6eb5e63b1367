"""LongCat-Image: position ids have no batch dimension, as in FLUX.1."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

_IDS = frozenset({"img_ids", "txt_ids"})

SPECS = (
    ModelSpec(pipeline="LongCatImagePipeline", packing=2, models=("LongCat-Image",), shared=_IDS),
    ModelSpec(
        pipeline="LongCatImageEditPipeline", packing=2, models=("LongCat-Image-Edit",), shared=_IDS, needs_image=True
    ),
)
