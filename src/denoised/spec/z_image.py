"""Z-Image: latents and captions are lists with one entry a row, the answer too."""

from __future__ import annotations

from denoised.spec.model_spec import ModelSpec

SPECS = (
    ModelSpec(
        pipeline="ZImagePipeline",
        packing=2,
        models=("Z-Image", "Z-Image-Turbo"),
        row_lists=frozenset({"x", "cap_feats"}),
        uncached=("noise_refiner", "context_refiner"),  # of pictures and of texts apart, and few
    ),
)
